"""What quality.py is asked for."""

import argparse
from pathlib import Path


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="assets/tiny-gemma-2", help="a folder or hub id")
    parser.add_argument(
        "--task",
        action="append",
        metavar="NAME[=train,val,test,ood]",
        help="JSON lines, or arithmetic_hard or arithmetic_harder (built in); may be given several times",
    )
    parser.add_argument(
        "--arms", nargs="+", help="only arms of these names, or with these parts in their names"
    )
    parser.add_argument("--agents", type=int, default=4, help="K")
    parser.add_argument("--sizes", type=int, nargs="*", default=[2, 8, 16], help="other numbers of agents")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--epochs", type=int, nargs="+", default=[4, 10])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--most-agents", type=int, default=16, help="of one run")
    parser.add_argument("--train-rows", type=int, default=960)
    parser.add_argument("--val-rows", type=int, default=1_000, help="half to tune on, half to calibrate on")
    parser.add_argument("--test-rows", type=int, default=1_000, help="likewise of the other kind")
    parser.add_argument("--longest", type=int, default=512, help="tokens of a row; longer ones are left out")
    parser.add_argument("--new-tokens", type=int, default=48, help="most tokens of a written answer")
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument(
        "--time-again",
        action="store_true",
        help="take the time of the measured arms' steps again and measure nothing else: where the runs of a "
        "study shared a GPU",
    )
    parser.add_argument("--list", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    return parser.parse_args()
