import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from ldm_jax.sharding.mesh import make_mesh
from ldm_jax.sharding.rules import MIN_SPLIT_ELEMENTS, fsdp_spec, shardings


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


TREE = {
    "params": {
        "unet": {
            "conv": {"kernel": shape(3, 3, 64, 128), "bias": shape(128)},
            "out": {"kernel": shape(3, 3, 128, 64)},
            "square": {"kernel": shape(256, 256)},
            "odd": {"kernel": shape(129, 255)},
        }
    }
}


def test_default_splits_the_largest_divisible_dimension():
    unet = shardings(TREE, make_mesh(2, 4))["params"]["unet"]
    assert unet["conv"]["kernel"].spec == P(None, None, None, "fsdp")
    assert unet["conv"]["bias"].spec == P()
    assert unet["out"]["kernel"].spec == P(None, None, "fsdp")
    assert unet["square"]["kernel"].spec == P(None, "fsdp")
    assert unet["odd"]["kernel"].spec == P()


@given(dims=st.lists(st.integers(1, 130), max_size=4), size=st.sampled_from([1, 2, 4, 8]))
def test_fsdp_spec_properties(dims, size):
    spec = fsdp_spec(tuple(dims), size)
    split = [i for i, name in enumerate(spec) if name == "fsdp"]
    divisible = [n for n in dims if n % size == 0]
    assert len(split) == int(size > 1 and bool(divisible) and np.prod(dims) >= MIN_SPLIT_ELEMENTS)
    if split:
        assert dims[split[0]] == max(divisible)
        assert all(n != dims[split[0]] for n in dims[split[0] + 1 :])


def test_first_match_wins_and_specs_may_be_given():
    rules = ((r"params/unet/conv/.*", "replicate"), (r".*/out/kernel", P("data")), (r".*", "fsdp"))
    tree = {"params": {"unet": {"conv": {"kernel": shape(3, 3, 64, 128)}, "out": {"kernel": shape(4, 64)}}}}
    unet = shardings(tree, make_mesh(2, 4), rules)["params"]["unet"]
    assert unet["conv"]["kernel"].spec == P()
    assert unet["out"]["kernel"].spec == P("data")


def test_bad_rules():
    mesh = make_mesh(2, 4)
    with pytest.raises(ValueError, match="no partition rule matches 'params/unet/conv/bias'"):
        shardings(TREE, mesh, ((r".*kernel", "fsdp"),))
    with pytest.raises(ValueError, match="unknown placement 'shard'"):
        shardings(TREE, mesh, ((r".*", "shard"),))
    with pytest.raises(ValueError, match=r"does not fit 'params/unet/odd/kernel' of shape \(129, 255\)"):
        shardings({"params": {"unet": {"odd": TREE["params"]["unet"]["odd"]}}}, mesh, ((r".*", P("fsdp")),))


def test_optimizer_state_lies_as_its_parameters_and_computation_is_unchanged():
    mesh = make_mesh(2, 4)
    params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (128, 256)), "bias": jnp.zeros(256)}}
    state = (params, optax.adam(1e-3).init(params))
    places = shardings(jax.eval_shape(lambda: state), mesh)
    assert places[1][0].mu["dense"]["kernel"].spec == places[0]["dense"]["kernel"].spec == P(None, "fsdp")
    x = np.ones((8, 128), np.float32)
    split = jax.device_put(params, places[0])
    assert split["dense"]["kernel"].addressable_shards[0].data.shape == (128, 64)
    with jax.set_mesh(mesh):
        y = jax.jit(lambda p, x: x @ p["dense"]["kernel"] + p["dense"]["bias"])(split, x)
    np.testing.assert_allclose(y, x @ np.asarray(params["dense"]["kernel"]), rtol=1e-5, atol=1e-5)
