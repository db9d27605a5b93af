"""Row norm of W0 + s B A, the constant that DoRA divides its magnitude by."""
