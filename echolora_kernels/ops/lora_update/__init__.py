"""A low-rank update of a product that another library has computed: y = g (base + s B A drop(x)) + bias."""
