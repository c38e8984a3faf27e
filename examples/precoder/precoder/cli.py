"""`python -m precoder`: train, report, speed."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import xccl
from precoder.config import TASKS, TrainConfig
from xccl.bootstrap import launcher


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 if a rank failed, 2 for wrong arguments or files."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.main(options))
    except xccl.XcclUsageError as error:
        return _fail(error, 2)
    except xccl.XcclError as error:
        return _fail(error, 1)
    except (ValueError, FileNotFoundError) as error:
        return _fail(error, 2)


def _fail(error: Exception, code: int) -> int:
    sys.stderr.write(f"precoder: {error}\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m precoder", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_report(commands)
    _add_speed(commands)
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="train a network", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    train.add_argument("task", nargs="?", choices=TASKS, default="mixed", help="what to train for")
    train.add_argument(
        "-n", "--ranks", type=int, help="start so many ranks; without it, be a rank of whoever started this"
    )
    train.add_argument("--network", help="which network")
    train.add_argument("--seed", type=int, help="of parameters and channels")
    train.add_argument("--steps", type=int, help="number of steps")
    train.add_argument("--batch", type=int, help="samples a step, over all ranks")
    train.add_argument("--rate", type=float, help="highest learning rate")
    train.add_argument("--samples", type=int, help="train on so many channels only")
    train.add_argument("--antennas", type=int, help="N")
    train.add_argument("--precision", choices=["float32", "float64"], help="of the training")
    train.add_argument("--out", type=Path, help="folder of the run; default: runs/TASK-NETWORK-SEED")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder")
    train.add_argument("--checkpoint-every", type=int, default=500, metavar="STEPS", help="steps between checkpoints")
    train.set_defaults(main=_train)


def _add_report(commands: Any) -> None:
    report = commands.add_parser("report", help="evaluate all finished runs; print the tables, draw the plots")
    report.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    report.add_argument("--out", type=Path, default=Path("runs/report"), help="folder for figures and plots")
    report.add_argument("--count", type=int, default=500, help="test channels in each cell")
    report.set_defaults(main=_report)


def _add_speed(commands: Any) -> None:
    speed = commands.add_parser("speed", help="measure: 2 ranks against 1, all_reduce against gloo, inference")
    speed.add_argument("part", choices=["ranks", "reduce", "inference"], help="what to measure")
    speed.add_argument("--out", type=Path, default=Path("runs/report"), help="folder for the figures")
    speed.set_defaults(main=_speed)


def _config(options: argparse.Namespace) -> TrainConfig:
    given = {f.name: getattr(options, f.name, None) for f in fields(TrainConfig)}
    return replace(TASKS[options.task], **{name: value for name, value in given.items() if value is not None})


def _train(options: argparse.Namespace) -> int:
    config = _config(options)
    out = options.out or Path("runs") / f"{options.task}-{config.network}-{config.seed}"
    if options.checkpoint_every < 1:
        raise ValueError(f"--checkpoint-every is at least 1, got {options.checkpoint_every}")
    keywords = {"resume": options.resume, "every": options.checkpoint_every}
    if options.ranks is None:
        with xccl.init() as comm:
            return _train_rank(comm, config, out, keywords)
    if launcher() is not None:
        raise ValueError(f"-n starts ranks, but this is a rank already, started by {launcher()}: leave -n out")
    xccl.run(_train_rank, options.ranks, config, out, keywords)
    return 0


def _train_rank(comm: xccl.Communicator, config: TrainConfig, out: Path, keywords: dict[str, Any]) -> int:
    # Imported by the ranks: their parent computes nothing with PyTorch, whose threads would not survive its fork.
    from precoder.train import train

    cost = train(comm, config, out, **keywords)
    if comm.rank == 0:
        sys.stderr.write(
            f"{out}: {cost['steps']} steps in {cost['wall_s']:.0f} s ({cost['cpu_s_per_rank']:.0f} s of CPU a rank), "
            f"{cost['share_in_all_reduce']:.1%} of it in all_reduce\n"
        )
    return 0


def _report(options: argparse.Namespace) -> int:
    from precoder.report import report

    return report(options.runs, options.out, options.count)


def _speed(options: argparse.Namespace) -> int:
    from precoder import speed

    return speed.PARTS[options.part](options.out)
