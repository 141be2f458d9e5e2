import pytest

from loadtest.slo import Slo, SloError, parse_slos


def test_targets_hold_for_all_classes_or_for_one() -> None:
    assert parse_slos(["ttft=0.5, tpot=0.05", "batch:e2e=20"], ["chat", "batch"]) == {
        "chat": Slo(ttft_s=0.5, tpot_s=0.05),
        "batch": Slo(e2e_s=20.0),
    }
    assert parse_slos([], ["chat"]) == {}
    assert str(Slo(ttft_s=0.5, e2e_s=2.0)) == "TTFT 500 ms, E2E 2000 ms"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("gold:ttft=1", "no class 'gold'; the classes are: chat, batch"),
        ("latency=1", "write seconds of ttft, tpot or e2e"),
        ("ttft", "write seconds"),
        ("ttft=0", "write seconds"),
        ("ttft=inf", "write seconds"),
        ("", "write seconds"),
    ],
)
def test_a_bad_target_says_what_to_change(text: str, problem: str) -> None:
    with pytest.raises(SloError, match=problem):
        parse_slos([text], ["chat", "batch"])
