"""`python -m ldm_jax.train --config configs/txt2img.py[:preset] --workdir DIR [--config.group.field=value ...]`.

A whole run, resumed where it stopped.
"""

import sys

from ldm_jax import cli


def main() -> int:
    args, overrides = cli.config_parser("Trains a first stage and a denoiser, whatever of them is not complete yet.").parse_known_args()
    from ldm_jax import config as configs

    config = configs.from_command(args.config, overrides)
    cli.start(config.train.dtype, args.coordinator, args.num_processes, args.process_id)
    from ldm_jax.training.signals import stopping_at_once

    with stopping_at_once():  # also around imports, which take seconds
        from ldm_jax.training.run import run

        workdir = run(config, configs.WorkDir(args.workdir), sys.argv)
    grids = sorted(workdir.samples.glob("*.png"))
    print(f"model: {workdir.model}\nsamples: {grids[-1] if grids else 'none'}")
    return cli.OK


if __name__ == "__main__":
    cli.keep_freed_memory()
    cli.guarded(main)
