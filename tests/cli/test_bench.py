"""`echolora bench` hands its flags on as they are."""

from echolora_kernels.benchmarks import command


def test_the_flags_arrive_in_order(echolora, capsys):
    flags = "--list --cases smollm2/layer/q/* smollm2/layer/k/* --rank 16 --method lora --dropout 0 --dtype bfloat16"
    assert echolora("bench", *flags.split()) == 0
    assert capsys.readouterr().out.split() == [
        f"smollm2/layer/{part}/lora/r16/p0/{echo}/bf16" for part in "qk" for echo in ("plain", "echo")
    ]


def test_help_and_errors(echolora, monkeypatch, capsys):
    assert echolora("bench", "--help") == 0
    assert "--roofline" in capsys.readouterr().out
    assert echolora("bench", "--nonsense").startswith("echolora: unrecognized arguments: --nonsense")
    monkeypatch.setattr(command, "main", lambda arguments: 1)
    assert echolora("bench") == 1
