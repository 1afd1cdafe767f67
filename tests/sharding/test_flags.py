import os
import subprocess
import sys

from ldm_jax.sharding.flags import GPU_ENVIRONMENT, LIBTPU_INIT_ARGS, XLA_FLAGS, set_environment, with_flags


def test_what_the_user_has_set_stays() -> None:
    given = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=/x"
    assert with_flags(given, XLA_FLAGS) == f"{given} --xla_gpu_all_reduce_combine_threshold_bytes=134217728"
    assert with_flags("", {"--a": "1", "--b": "2"}) == "--a=1 --b=2"


def test_the_environment_of_each_machine() -> None:
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
    set_environment(env, nvidia=True)
    assert env["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5" and set(env) == {"LIBTPU_INIT_ARGS", "XLA_FLAGS", *GPU_ENVIRONMENT}
    plain: dict[str, str] = {}
    set_environment(plain, nvidia=False)
    assert set(plain) == {"LIBTPU_INIT_ARGS"} and all(name in plain["LIBTPU_INIT_ARGS"] for name in LIBTPU_INIT_ARGS)
    again = dict(plain)
    set_environment(again, nvidia=False)
    assert again == plain


def test_jax_knows_every_flag_of_gpus() -> None:
    """A flag that this version of XLA does not know would end the process."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": with_flags("", XLA_FLAGS)}
    done = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
