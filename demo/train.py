"""Train the bundled checkpoint from scratch: `python -m demo.train`.

A run can be stopped at any time; the same command resumes it. demo/training/stages.py lists the stages. A GPU is used if
there is one.
"""

import argparse
from pathlib import Path

from common.arguments import positive_integer
from demo.model.export import write_checkpoint
from demo.training.run import TrainingRun
from demo.training.stages import STAGES

RELATIVE_THRESHOLD, ABSOLUTE_THRESHOLD = 0.0, 0.6
"""The router's default thresholds in the checkpoint. demo/README.md shows what they save and cost."""


def main() -> None:
    """Run all stages that are not done, and write the checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("demo/run"), help="folder of the run (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo/checkpoint"), help="folder of the checkpoint (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=35, help="seed of weights and images (default: %(default)s)")
    parser.add_argument("--workers", type=positive_integer, default=2, help="processes that draw images (default: %(default)s)")
    arguments = parser.parse_args()
    run = TrainingRun(arguments.run, arguments.seed, arguments.workers)
    for stage in STAGES:
        if not run.is_done(stage):
            stage.train(run, stage)
        run.model.zero_grad(set_to_none=True)
    write_checkpoint(run.model, run.tokenizer, arguments.out, RELATIVE_THRESHOLD, ABSOLUTE_THRESHOLD)
    print(f"Checkpoint written to {arguments.out} after {run.seconds / 3600:.1f} hours of training.")


if __name__ == "__main__":
    main()
