"""The two operators as ONNX functions made of standard operators, for runtimes that have no kernel of ours.

A bundle's graph holds one node for each operator, in our domain. A runtime that registered a kernel or plugin for it
uses that; any other inlines the body that stands in the same file. The bodies walk over blocks of rows with Scan and
never hold an N x N matrix. Contract: `docs/operators.md`.

Why they look as they do:

- Scan and not Loop: a Loop has to Concat its results, which copies all of them at every step.
- What a Scan body needs travels as state although nothing changes it: TensorRT's parser refuses a Scan without state,
  OpenVINO a body that captures a value. `k` is no state, since TensorRT then refuses TopK.
- Constants are `value` tensors: onnx-graphsurgeon, polygraphy and onnxslim read ``value_float`` and ``value_int`` as
  float64. Only an attribute (``@k``) can be referred to in no other way; it is cast at once, which undoes that.
- Only operators that onnxruntime's CPU kernels and TensorRT's parser both have, indices int32 where TensorRT wants
  them. No IsInf or IsNaN on score blocks: ``|score| < inf`` is false for both and is one pass.
- N = 0 is given one block of padding, and the tables one spare row: onnxruntime dies on a Scan of no steps.
"""

from __future__ import annotations

from collections.abc import Collection

from onnx import FunctionProto, helper, parser

from nformer_edge.core.errors import UsageError
from nformer_edge.ops.contract import DOMAIN, OPSETS, RECIPROCAL_NEIGHBOR_ATTENTION, ROW_TOP_K

#: Opset 18 brought ReduceMax in the form used here; nothing here needs a newer one, and devices have older runtimes.
DEFAULT_OPSET = 18

#: The first that has default values for function attributes.
IR_VERSION = 9

#: Rows a step. RowTopK in stock onnxruntime, N = M = 20,000, k = 20, two cores: at R = 5, H = 2, blocks of 32, 128 and
#: 512 take 2.8, 2.3 and 2.7 s and 34, 95 and 356 MB; at R = 256, H = 1, 4.9, 3.0 and 2.8 s and 99, 130 and 273 MB.
#: The attention does not care: 0.3 s from 64 to 1,024.
BLOCK = 128


_SPLIT = """
  zero = Constant <value = int64[1] {{0}}> ()
  one = Constant <value = int64[1] {{1}}> ()
  block = Constant <value = int64[1] {{{block}}}> ()
  rows = Cast <to = 1> (a)
  heads = Shape <start = 0, end = 1> (a)
  num_rows = Shape <start = 1, end = 2> (a)
  length = Shape <start = 2, end = 3> (a)
  block_less_one = Sub (block, one)
  rounded_up = Add (num_rows, block_less_one)
  blocks_full = Div (rounded_up, block)
  blocks = Max (blocks_full, one)
  padded = Mul (blocks, block)
  padding = Sub (padded, num_rows)
  no_padding = Constant <value = int64[4] {{0, 0, 0, 0}}> ()
  row_padding = Concat <axis = 0> (no_padding, padding, zero)
  rows_padded = Pad (rows, row_padding)
  rows_shape = Concat <axis = 0> (heads, blocks, block, length)
  row_blocks = Reshape (rows_padded, rows_shape)
  axis_of_rows = Constant <value = int64[1] {{1}}> ()
"""

_ROW_TOP_K = """
<domain: "{domain}", opset_import: ["" : {opset}]>
{name} <k> (a, b) => (neighbors)
{{
  {split}
  b32 = Cast <to = 1> (b)
  keys = Transpose <perm = [0, 2, 1]> (b32)
  k_given = Constant <value_int : int = @k> ()
  k_scalar = Cast <to = 7> (k_given)
  k_asked = Reshape (k_scalar, one)
  num_columns = Shape <start = 1, end = 2> (b)
  k_found = Min (k_asked, num_columns)
  keys_after, found = Scan <num_scan_inputs = 1, scan_input_axes = [1], scan_output_axes = [1],
    body = rank_rows (float[H, R, M] keys_now, float[H, B, R] row_block)
      => (float[H, R, M] keys_next, int32[H, B, F] chosen) {{
        infinity = Constant <value = float {{inf}}> ()
        lowest = Constant <value = float {{-inf}}> ()
        nobody = Constant <value = int64 {{-1}}> ()
        k_as_given = Constant <value_int : int = @k> ()
        k_as_int64 = Cast <to = 7> (k_as_given)
        shape_of_k = Constant <value = int64[1] {{1}}> ()
        k_wanted = Reshape (k_as_int64, shape_of_k)
        columns = Shape <start = 2, end = 3> (keys_now)
        k_now = Min (k_wanted, columns)
        score = MatMul (row_block, keys_now)
        size = Abs (score)
        is_finite = Less (size, infinity)
        candidate = Where (is_finite, score, lowest)
        best, column = TopK <axis = -1, largest = 1, sorted = 1> (candidate, k_now)
        is_chosen = Greater (best, lowest)
        column_or_nobody = Where (is_chosen, column, nobody)
        chosen = Cast <to = 6> (column_or_nobody)
        keys_next = Identity (keys_now)
      }}> (keys, row_blocks)
  joined_shape = Concat <axis = 0> (heads, padded, k_found)
  joined = Reshape <allowzero = 1> (found, joined_shape)
  real_rows = Slice (joined, zero, num_rows, axis_of_rows)
  missing = Sub (k_asked, k_found)
  tail_padding = Concat <axis = 0> (no_padding, zero, missing)
  nobody32 = Constant <value = int32 {{-1}}> ()
  neighbors = Pad (real_rows, tail_padding, nobody32)
}}
"""

# A neighbor that does not count is replaced by the row itself before anything is gathered: its weight is 0, but
# 0 * NaN is not, and one bad row must never touch another. A line with a mark stands only in some of the variants:
# `plain` in version 1, `gated` in version 2, and of that `single` without cameras, `cameras` with them.
_ATTENTION = """
<domain: "{domain}", opset_import: ["" : {opset}]>
{name}
plain   | <scale> (a, b, v, neighbors) => (y)
single  | <scale> (a, b, v, neighbors, t) => (y)
cameras | <scale, camera_factor> (a, b, v, neighbors, t, cameras) => (y)
{{
  {split}
  lists = Shape <start = 0, end = 1> (neighbors)
  num_neighbors = Shape <start = 2, end = 3> (neighbors)
  value_size = Shape <start = 2, end = 3> (v)

  scale_attribute = Constant <value_float : float = @scale> ()
  scale_given = Cast <to = 1> (scale_attribute)
  scale_absent = IsNaN (scale_given)
  value_size32 = Cast <to = 1> (value_size)
  root = Sqrt (value_size32)
  scale_default = Reciprocal (root)
  factor = Where (scale_absent, scale_default, scale_given)

  nobody = Constant <value = int32 {{-1}}> ()
  list_padded = Pad (neighbors, row_padding, nobody)
  list_shape = Concat <axis = 0> (lists, blocks, block, num_neighbors)
  list_blocks = Reshape (list_padded, list_shape)

  zero_index = Constant <value = int32 {{0}}> ()
  one_index = Constant <value = int32 {{1}}> ()
  padded32 = Cast <to = 6> (padded)
  num_rows32 = Cast <to = 6> (num_rows)
  scalar_shape = Constant <value = int64[0] {{}}> ()
  padded_scalar = Reshape (padded32, scalar_shape)
  counted = Range (zero_index, padded_scalar, one_index)
  last_row = Sub (num_rows32, one_index)
  row_up_to_last = Min (counted, last_row)
  row_index = Max (row_up_to_last, zero_index)
  index_shape = Concat <axis = 0> (blocks, block)
  index_blocks = Reshape (row_index, index_shape)

  heads32 = Cast <to = 6> (heads)
  heads_scalar = Reshape (heads32, scalar_shape)
  head = Range (zero_index, heads_scalar, one_index)
  head_start = Mul (head, num_rows32)
  per_head = Constant <value = int64[3] {{-1, 1, 1}}> ()
  head_offset = Reshape (head_start, per_head)
plain   | list_offset = Slice (head_offset, zero, lists, zero)

  spare_if_any = Sub (one, num_rows)
  spare = Max (spare_if_any, zero)
  table_rows = Max (num_rows, one)
  spare_padding = Concat <axis = 0> (no_padding, spare, zero)
  b32 = Cast <to = 1> (b)
  b_spared = Pad (b32, spare_padding)
  v32 = Cast <to = 1> (v)
  v_spared = Pad (v32, spare_padding)
plain   | lists_spared = Pad (neighbors, spare_padding, nobody)
  all_rows = Mul (heads, table_rows)
plain   | all_lists = Mul (lists, table_rows)
  keys_shape = Concat <axis = 0> (all_rows, length)
  keys = Reshape (b_spared, keys_shape)
  values_shape = Concat <axis = 0> (all_rows, value_size)
  values = Reshape (v_spared, values_shape)
plain   | choices_shape = Concat <axis = 0> (all_lists, num_neighbors)
plain   | choices = Reshape (lists_spared, choices_shape)
gated   | t_shape = Concat <axis = 0> (heads, num_rows)
gated   | t_all = Expand (t, t_shape)
gated   | t_padding = Concat <axis = 0> (zero, zero, zero, spare)
gated   | t_spared = Pad (t_all, t_padding)
gated   | thresholds = Reshape (t_spared, all_rows)
cameras | camera_padding = Concat <axis = 0> (zero, spare)
cameras | cameras_spared = Pad (cameras, camera_padding, nobody)
cameras | camera_factor_attribute = Constant <value_float : float = @camera_factor> ()
cameras | camera_factor_scalar = Cast <to = 1> (camera_factor_attribute)
cameras | camera_factor = Reshape (camera_factor_scalar, one)

  keys_after,
plain   | choices_after, list_offset_after,
  values_after,
gated   | thresholds_after,
cameras | cameras_after, camera_factor_after,
  head_offset_after, factor_after, found = Scan <
    num_scan_inputs = 3, scan_input_axes = [1, 1, 0], scan_output_axes = [1],
    body = attend_rows (float[T, R] keys_now,
plain   | int32[U, K] choices_now, int32[L, 1, 1] list_offset_now,
      float[T, D] values_now,
gated   | float[T] thresholds_now,
cameras | int32[N] cameras_now, float[1] camera_factor_now,
      int32[H, 1, 1] head_offset_now, float[1] factor_now,
      float[H, B, R] row_block, int32[L, B, K] list_block, int32[B] index)
      => (float[T, R] keys_next,
plain   | int32[U, K] choices_next, int32[L, 1, 1] list_offset_next,
      float[T, D] values_next,
gated   | float[T] thresholds_next,
cameras | int32[N] cameras_next, float[1] camera_factor_next,
      int32[H, 1, 1] head_offset_next, float[1] factor_next,
      float[H, B, D] attended) {{
        first_row = Constant <value = int32 {{0}}> ()
        half = Constant <value = float {{0.5}}> ()
        infinity = Constant <value = float {{inf}}> ()
        nothing = Constant <value = float {{0}}> ()
plain   | least_total = Constant <value = float {{1}}> ()
plain   | lowest = Constant <value = float {{-3.4028234e38}}> ()
gated   | unit = Constant <value = float {{1}}> ()
        last = Constant <value = int64[1] {{-1}}> ()
        third = Constant <value = int64[1] {{2}}> ()
        along_rows = Constant <value = int64[2] {{0, 2}}> ()
plain   | along_rows_and_lists = Constant <value = int64[3] {{0, 2, 3}}> ()
        is_real = GreaterOrEqual (list_block, first_row)
        neighbor = Max (list_block, first_row)
plain   | at_list = Add (neighbor, list_offset_now)
plain   | their_choices = Gather (choices_now, at_list)
plain   | me = Unsqueeze (index, along_rows_and_lists)
plain   | is_me = Equal (their_choices, me)
plain   | is_me32 = Cast <to = 1> (is_me)
plain   | how_often = ReduceMax <keepdims = 0> (is_me32, last)
plain   | chose_me = Greater (how_often, half)
plain   | counts = And (is_real, chose_me)

        myself = Unsqueeze (index, along_rows)
gated   | is_me = Equal (list_block, myself)
gated   | is_other = Not (is_me)
gated   | counts = And (is_real, is_other)
        safe_neighbor = Where (counts, neighbor, myself)
        at = Add (safe_neighbor, head_offset_now)
        key = Gather (keys_now, at)
        row = Unsqueeze (row_block, third)
        product = Mul (key, row)
        score = ReduceSum <keepdims = 0> (product, last)
plain   | size = Abs (score)
plain   | is_finite = Less (size, infinity)
gated   | at_myself = Add (myself, head_offset_now)
gated   | my_threshold = Gather (thresholds_now, at_myself)
gated   | their_threshold = Gather (thresholds_now, at)
gated   | above_mine = Sub (score, my_threshold)
gated   | above_theirs = Sub (score, their_threshold)
gated   | size_of_mine = Abs (above_mine)
gated   | size_of_theirs = Abs (above_theirs)
gated   | mine_is_finite = Less (size_of_mine, infinity)
gated   | theirs_is_finite = Less (size_of_theirs, infinity)
gated   | is_finite = And (mine_is_finite, theirs_is_finite)
        weighs = And (counts, is_finite)
plain   | scaled = Mul (score, factor_now)
plain   | masked = Where (weighs, scaled, lowest)
plain   | peak = ReduceMax (masked, last)
plain   | below_peak = Sub (masked, peak)
plain   | power = Exp (below_peak)
plain   | share = Where (weighs, power, nothing)
plain   | sum = ReduceSum (share, last)
plain   | total = Max (sum, least_total)
plain   | weight = Div (share, total)
gated   | half_of_mine = Mul (above_mine, half)
gated   | half_of_theirs = Mul (above_theirs, half)
gated   | gap = Add (half_of_mine, half_of_theirs)
gated   | scaled = Mul (gap, factor_now)
gated   | distance = Abs (scaled)
gated   | below_zero = Neg (distance)
gated   | power = Exp (below_zero)
gated   | is_above = GreaterOrEqual (scaled, nothing)
gated   | part = Where (is_above, unit, power)
gated   | whole = Add (power, unit)
gated   | gate = Div (part, whole)
single  | weight = Where (weighs, gate, nothing)
cameras | my_camera = Gather (cameras_now, myself)
cameras | their_camera = Gather (cameras_now, safe_neighbor)
cameras | is_same = Equal (their_camera, my_camera)
cameras | is_known = GreaterOrEqual (their_camera, first_row)
cameras | is_shared = And (is_same, is_known)
cameras | factor_of_pair = Where (is_shared, camera_factor_now, unit)
cameras | gate_of_pair = Mul (gate, factor_of_pair)
cameras | weight = Where (weighs, gate_of_pair, nothing)
        weight_row = Unsqueeze (weight, third)
        value = Gather (values_now, at)
        weighted = MatMul (weight_row, value)
        attended = Squeeze (weighted, third)
        keys_next = Identity (keys_now)
plain   | choices_next = Identity (choices_now)
plain   | list_offset_next = Identity (list_offset_now)
        values_next = Identity (values_now)
gated   | thresholds_next = Identity (thresholds_now)
cameras | cameras_next = Identity (cameras_now)
cameras | camera_factor_next = Identity (camera_factor_now)
        head_offset_next = Identity (head_offset_now)
        factor_next = Identity (factor_now)
      }}> (keys,
plain   | choices, list_offset,
        values,
gated   | thresholds,
cameras | cameras_spared, camera_factor,
        head_offset, factor, row_blocks, list_blocks, index_blocks)
  joined_shape = Concat <axis = 0> (heads, padded, value_size)
  joined = Reshape (found, joined_shape)
  real_rows = Slice (joined, zero, num_rows, axis_of_rows)
  y = CastLike (real_rows, v)
}}
"""


#: The marks of the variant for each number of inputs.
_VARIANTS = {4: ("plain",), 5: ("gated", "single"), 6: ("gated", "cameras")}


def check_opset(opset: int) -> None:
    """Raises UsageError unless the bodies exist for this opset of the standard domain."""
    if opset not in OPSETS:
        raise UsageError("opset", opset, " | ".join(map(str, OPSETS)), f"Leave it out to get {DEFAULT_OPSET}.")


def row_top_k_function(opset: int = DEFAULT_OPSET, *, block: int = BLOCK) -> FunctionProto:
    """`RowTopK`: a [H, N, R], b [H, M, R] -> neighbors int32 [H, N, k].

    Memory beyond inputs and output is some `3 * H * block * M` floats, whatever N is.

    Args:
        opset: of the model that will carry it; a function must import what its model imports.
        block: rows a step.
    """
    check_opset(opset)
    return _parse(_ROW_TOP_K, ROW_TOP_K, opset, block)


def reciprocal_neighbor_attention_function(
    opset: int = DEFAULT_OPSET, *, inputs: int = 4, block: int = BLOCK
) -> FunctionProto:
    """`ReciprocalNeighborAttention`: a, b [H, N, R], v [H, N, D], neighbors [H or 1, N, K] -> y [H, N, D].

    A node without `scale` gets 1 / sqrt(D): the attribute's default is NaN, which stands for that (any number could
    be meant, 0 too). The running softmax total is at least 1 wherever a neighbor counts, as the maximum was
    subtracted; so dividing by max(total, 1) is exact there and leaves 0 where none counts.

    Args:
        opset: of the model that will carry it.
        inputs: of the node: 4, 5 with thresholds t [H or 1, N], or 6 with cameras [N] as well. A model has one body,
            so all its attentions have equally many.
        block: rows a step; memory beyond inputs and output is some `block * K * (2 * K + H * (2 * R + D))` numbers.
    """
    check_opset(opset)
    function = _parse(_ATTENTION, RECIPROCAL_NEIGHBOR_ATTENTION, opset, block, _VARIANTS[inputs])
    del function.attribute[:]  # an attribute stands either here or, with its default, in attribute_proto
    function.attribute_proto.append(helper.make_attribute("scale", float("nan")))
    if inputs == 6:
        function.attribute_proto.append(helper.make_attribute("camera_factor", 1.0))
    return function


def functions(opset: int = DEFAULT_OPSET, inputs: int = 4) -> list[FunctionProto]:
    """Both bodies, to append to a model whose standard opset is `opset` and whose attentions have `inputs` inputs."""
    return [row_top_k_function(opset), reciprocal_neighbor_attention_function(opset, inputs=inputs)]


def _parse(text: str, name: str, opset: int, block: int, marks: Collection[str] = ()) -> FunctionProto:
    lines = (line.rpartition("|") for line in text.splitlines())
    kept = "\n".join(line for mark, _, line in lines if not mark or mark.strip() in marks)
    split = _SPLIT.format(block=block).strip()
    function = parser.parse_function(kept.format(domain=DOMAIN, name=name, opset=opset, split=split))
    function.doc_string = "Standard-operator body of the operator contract; a registered kernel takes its place."
    return function
