"""`python -m ldm_jax.encode --config ... --workdir DIR`: the latent cache of a run whose first stage is complete, and nothing else."""

from ldm_jax import cli


def main() -> int:
    args, overrides = cli.config_parser("Encodes the images of a configuration into its latent cache.").parse_known_args()
    from ldm_jax import config as configs

    config = configs.from_command(args.config, overrides)
    cli.start(config.train.dtype, args.coordinator, args.num_processes, args.process_id)
    from ldm_jax.training.signals import stopping_at_once

    with stopping_at_once():
        from ldm_jax.training.run import encode

        cache = encode(config, configs.WorkDir(args.workdir))
    print(f"latents: {cache.directory}")
    return cli.OK


if __name__ == "__main__":
    cli.keep_freed_memory()
    cli.guarded(main)
