"""Parsing compiled programs: collectives in loops, and the CPU's float32 copies."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from train_jax.parallel.sharding import make_mesh
from train_jax.plan import hlo

MESH = {"data": 8, "fsdp": 1, "tensor": 1}

TEXT = """\
HloModule jit_f

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %s = f32[] add(%x, %y)
}

%inner (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %g = f32[8,2]{1,0:T(8,128)} all-gather(%x), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %t = (s32[], f32[4]) tuple(%i, %r)
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %r = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce(%a, %b), to_apply=%add
  ROOT %w = (s32[], f32[4]) while(%t), condition=%cond, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
}

%other (p: f32[4]) -> f32[4] {
  ROOT %c = f32[4]{0} collective-permute(%p), source_target_pairs={{0,1}}
}

ENTRY %main (p: bf16[4]) -> f32[4] {
  %p = bf16[4]{0} parameter(0)
  %s = (f32[16]{0}, f32[2]{0}) reduce-scatter-start(%p), dimensions={0}
  %d = f32[2]{0} reduce-scatter-done(%s)
  %w = (s32[], /*index=1*/f32[4]{0}) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %u = (s32[], f32[4]{0}) while(%t), condition=%cond, body=%inner
  ROOT %k = f32[4]{0} conditional(%i, %a, %b), branch_computations={%other, %add}
}
"""


def test_collectives_count_with_their_loops_and_once_when_asynchronous():
    reduced, gathered = 4 * 4 + 2 * 6, 4 * 16
    assert hlo.collective_bytes(hlo.parse(TEXT)) == {
        "all-reduce": 5 * reduced,
        "all-gather": 5 * 3 * gathered + gathered,  # a loop of unknown length counts once
        "reduce-scatter": 8,
        "collective-permute": 16,
    }


FUSED = """\
HloModule jit_f, is_scheduled=true

%begin (p: bf16[2]) -> (bf16[2], bf16[16]) {
  ROOT %g = bf16[16]{0} all-gather(%p), channel_id=6, dimensions={0}
}

%advance (p: bf16[2], x: f32[4]) -> (f32[4], bf16[16]) {
  %c = f32[4]{0} convolution(%x, %x)
  %g = bf16[16]{0} all-gather(%p), channel_id=6, dimensions={0}
  ROOT %t = (f32[4], bf16[16]) tuple(%c, %g)
}

%end (p: bf16[2]) -> bf16[16] {
  ROOT %g = bf16[16]{0} all-gather(%p), channel_id=6, dimensions={0}
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (bf16[2], bf16[16]) fusion(%p), kind=kCustom, calls=%begin
  %a = (f32[4], bf16[16]) fusion(%s, %x), kind=kOutput, calls=%advance
  %d = bf16[16] fusion(%a), kind=kCustom, calls=%end
  %alone = (f32[2]{0}, f32[8]{0}) all-reduce-start(%p), channel_id=7
  ROOT %waited = f32[8]{0} all-reduce-done(%alone)
}

ENTRY %main (p: bf16[4]) -> f32[4] {
  ROOT %w = (s32[], f32[4]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""


def test_a_collective_that_several_fusions_advance_counts_once_and_overlaps():
    module = hlo.parse(FUSED)
    assert hlo.collective_bytes(module) == {"all-gather": 5 * 32, "all-reduce": 5 * 32}
    assert hlo.collective_bytes(module, overlapped=True) == {"all-gather": 5 * 32}
    assert hlo.collective_bytes(module, overlapped=False) == {"all-reduce": 5 * 32}


@pytest.mark.parametrize(
    "text, size",
    [("f32[8,64]{1,0}", 2048), ("pred[3]{0}", 3), ("s4[3]{0}", 2), ("bf16[]", 2), ("f8e4m3fn[5]", 5), ("token[]", 0),
     ("(f32[2]{0}, /*index=1*/s8[3]{0}, c64[2])", 8 + 3 + 16)],
)  # fmt: skip
def test_bytes_of_types(text, size):
    assert hlo.type_bytes(text) == size


def compiled(function, spec_in, spec_out, shape):
    mesh = make_mesh(MESH)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec_in, out_specs=spec_out, check_vma=False)
    return hlo.parse(jax.jit(mapped).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile().as_text())


COLLECTIVES = {
    "all-reduce": (lambda x: jax.lax.psum(x, "data"), P("data"), P(), 4 * 2 * 3),
    "all-gather": (lambda x: jax.lax.all_gather(x, "data", tiled=True), P("data"), P(), 4 * 16 * 3),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "data", tiled=True), P(), P("data"), 4 * 2 * 3),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)]), P("data"), P("data"), 4 * 2 * 3
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_collectives_of_the_compiler_are_parsed(kind):
    function, spec_in, spec_out, size = COLLECTIVES[kind]
    assert hlo.collective_bytes(compiled(function, spec_in, spec_out, (16, 3))) == {kind: size}


def test_a_collective_in_a_scan_counts_with_its_length():
    def scanned(x):
        return jax.lax.scan(lambda y, _: (jnp.sin(jax.lax.psum(y, "data")), None), x, length=5)[0]

    assert hlo.collective_bytes(compiled(scanned, P("data"), P(), (16, 3))) == {"all-reduce": 5 * 4 * 2 * 3}


# Text of jax 0.10's CPU compiler for a scan over six stacked bfloat16 layers, shortened; jax 0.12 makes no copies.
COPIED = """
%convert_up (param_0: bf16[6,64,128]) -> f32[6,64,128] {
  ROOT %convert.1 = f32[6,64,128]{2,1,0} convert(%param_0)
}

%body (state: (bf16[32,64], f32[6,64,128], f32[6,128,64])) -> (bf16[32,64], f32[6,64,128], f32[6,128,64]) {
  %state = (bf16[32,64]{1,0}, f32[6,64,128]{2,1,0}, f32[6,128,64]{2,1,0}) parameter(0)
  %x.2 = bf16[32,64]{1,0} get-tuple-element(%state), index=0
  %wrapped_convert.3 = f32[32,64]{1,0} fusion(%x.2), kind=kLoop, calls=%convert_x
}

ENTRY %main.6 (up.1: bf16[6,64,128], down.1: bf16[6,128,64], x.1: bf16[32,64]) -> bf16[32,64] {
  %up.1 = bf16[6,64,128]{2,1,0} parameter(0), metadata={op_name="up"}
  %down.1 = bf16[6,128,64]{2,1,0} parameter(1), metadata={op_name="down"}
  %x.1 = bf16[32,64]{1,0} parameter(2), metadata={op_name="x"}
  %wrapped_convert.1 = f32[6,64,128]{2,1,0} fusion(%up.1), kind=kLoop, calls=%convert_up
  %convert.2 = f32[6,128,64]{2,1,0} convert(%down.1)
  %tuple.8 = (bf16[32,64]{1,0}, f32[6,64,128]{2,1,0}, f32[6,128,64]{2,1,0}) tuple(%x.1, %wrapped_convert.1, %convert.2)
  %while.1 = (bf16[32,64]{1,0}, f32[6,64,128]{2,1,0}, f32[6,128,64]{2,1,0}) while(%tuple.8), condition=%c, body=%body
}
"""


def test_copies_of_stacked_weights_are_found():
    """Copies before the loop count, fused or not; conversions inside a fusion have no buffer."""
    activation, layers = 4 * 32 * 64, 4 * 6 * 128 * 64
    assert hlo.float32_copies(hlo.parse(COPIED)) == 2 * layers + activation


@pytest.mark.parametrize("unchanged", ["f32[6,64,128]{2,1,0} parameter", "s8[6,64,128]{2,1,0} parameter"])
def test_copies_of_other_arguments_do_not_count(unchanged):
    text = COPIED.replace("bf16[6,64,128]{2,1,0} parameter", unchanged).replace("x.1 = bf16", "x.1 = f32")
    assert hlo.float32_copies(hlo.parse(text)) == 4 * 6 * 128 * 64
