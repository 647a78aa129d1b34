"""The operators that a stranger's file may name: `python tests/census/operators.py` (one core, three minutes).

Written to `se_inject/loading/operators.json`: what the source of torchvision, timm and torch.nn calls, what their
exported programs and TorchScript archives are made of (`ARCHIVES`, a network of each kind), and `KIN`, operations of the same
kind that other people's convolutional networks use. Left out is what begins with an underscore, unless every archive has it
(`UNDERSCORED`), and what `EXCLUDED` matches: operators whose arguments torch doesn't check, and those that need no network.
"""

import ast
import json
import re
import sys
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import torch  # noqa: E402 - the project's own tests folder comes first
import torchvision  # noqa: E402

from se_inject.forwards.vocabulary import _NAMESPACES, _function_in  # noqa: E402
from se_inject.loading import load  # noqa: E402
from se_inject.loading.torchscript.reader import operators_of  # noqa: E402

TARGET = HERE.parent.parent / "se_inject" / "loading" / "operators.json"
SITE = Path(torch.__file__).parent.parent
SOURCES = ("timm/models", "timm/layers", "torchvision/models", "torchvision/ops", "torch/nn/modules")
SPACES = {
    "torch": "torch", "F": "torch.nn.functional", "torch.nn.functional": "torch.nn.functional",
    "nn.functional": "torch.nn.functional", "torch._C._nn": "torch._C._nn", "torch.linalg": "torch.linalg", "torch.fft": "torch.fft",
    "torch.special": "torch.special", "math": "math", "operator": "operator",
}  # fmt: skip
ARCHIVES = (
    "torchvision:resnet18", "torchvision:mobilenet_v3_small", "torchvision:vit_b_32", "torchvision:convnext_tiny",
    "timm:test_byobnet", "timm:test_vit", "timm:ghostnet_050", "timm:test_nfnet",
)  # fmt: skip
UNDERSCORED = {
    "_convolution",  # what tracing makes of every convolution
    "_convolution_mode",
    "_native_batch_norm_legit_no_training",  # of a program that was decomposed
    "_native_batch_norm_legit_functional",
    "_native_batch_norm_legit",
    "_to_copy",
    *(
        f"_upsample_{mode}_aa" for mode in ("bilinear2d", "bicubic2d", "lanczos2d")
    ),  # in the source of every F.interpolate
    *(f"_upsample_nearest_exact{rank}d" for rank in (1, 2, 3)),
    "_softmax",
    "_log_softmax",
    "_adaptive_avg_pool2d",
}
EXCLUDED = re.compile(
    r"^_|unsafe|sparse|nested|quantiz|quantis|qint|backward|mkldnn|cudnn|miopen|mps_|xnnpack|fbgemm|from_file|^save$|^load$|fused|"
    r"loss|^native_(group|batch|multi)|batch_norm_(elemt|stats|gather|update)|embedding_bag|segment|max_unpool|"
    r"fractional|roi_pool|ps_roi|deform|qnms|qroi|rotated|_with_distance|^fill|^resize|as_strided|^set_|from_numpy|from_buffer|"
    r"^call$|getter|methodcaller|register|storage|data_ptr|numpy|^share|^module_|^record|^apply|^map|tolist|^is_|autocast|^get_|"
    r"deterministic|^compile$|typename|^new$|to_dense|^indices$|^values$|to_padded|linear_cross_entropy|dlpack|^vmap$|^index$|"
    r"bincount|histc|^name$|^type$|^cuda$|^xpu$|^ipu$|^mtia$|_init$|clear|^requires_grad_$|affine_grid_generator"
)
KIN = {
    "operator": """add sub mul truediv floordiv mod pow matmul neg pos abs eq ne lt le gt ge and_ or_ xor not_ invert lshift rshift
        getitem setitem contains is_ is_not iadd isub imul itruediv ifloordiv imod ipow iand ior ixor imatmul truth concat""",
    "math": "floor ceil sqrt log log2 exp prod gcd trunc fabs fmod pow isfinite sin cos",
    "torch": """abs acos add addcdiv addcmul addmm addmv alpha_dropout amax amin aminmax any all arange argmax argmin argsort asin atan
        atan2 avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d baddbmm batch_norm bilinear bmm broadcast_tensors broadcast_to
        cartesian_prod cat cdist ceil celu celu_ channel_shuffle chunk clamp clamp_ clamp_max clamp_max_ clamp_min clamp_min_ clip clone
        column_stack complex concat concatenate constant_pad_nd conv1d conv2d conv3d conv_transpose1d conv_transpose2d
        conv_transpose3d convolution cos cosh cosine_similarity count_nonzero cross cummax cummin cumprod cumsum deg2rad det
        detach diag diag_embed diagonal diff dist div divide dot dropout dropout_ dsplit dstack einsum embedding empty empty_like
        eq equal erf erfc erfinv exp exp2 expm1 eye feature_alpha_dropout feature_dropout flatten flip fliplr flipud
        float_power floor floor_divide fmax fmin fmod frac full full_like gather ge greater greater_equal group_norm gt
        hardshrink heaviside hsplit hstack hypot imag index_add index_copy index_fill index_put index_select instance_norm
        inverse isclose isfinite isinf isnan isneginf isposinf kron kthvalue layer_norm le lerp less less_equal linspace log log10
        log1p log2 log_softmax logaddexp logaddexp2 logcumsumexp logical_and logical_not logical_or logical_xor logit logspace
        logsumexp lt masked_fill masked_scatter masked_select matmul matrix_exp max max_pool1d max_pool2d max_pool3d maximum mean median
        meshgrid min minimum mm mode moveaxis movedim mul multiply mv nan_to_num nanmean nanmedian nanquantile nansum narrow ne neg negative
        nextafter nonzero norm normal not_equal ones ones_like outer pairwise_distance permute pinverse pixel_shuffle pixel_unshuffle
        polar positive pow prelu prod quantile rad2deg rand rand_like randint randint_like randn randn_like randperm ravel real
        reciprocal relu relu_ remainder renorm repeat_interleave reshape rms_norm roll rot90 round rrelu rsqrt rsub scalar_tensor scatter
        scatter_add scatter_reduce searchsorted select selu selu_ sigmoid sigmoid_ sign signbit sin sinc sinh slice_scatter
        select_scatter diagonal_scatter softmax sort split split_with_sizes sqrt square squeeze stack std std_mean sub subtract sum svd
        swapaxes swapdims t take take_along_dim tan tanh tanh_ tensor tensor_split tensordot threshold threshold_ tile topk trace transpose
        trapezoid tril triu true_divide trunc unbind unflatten unique unique_consecutive unsqueeze var var_mean vstack
        view_as_complex view_as_real where xlogy zeros zeros_like is_tensor is_floating_point is_complex numel sym_size
        slice native_layer_norm native_dropout upsample_nearest1d upsample_nearest2d upsample_nearest3d
        upsample_bilinear2d upsample_bicubic2d upsample_linear1d upsample_trilinear3d unfold fold col2im im2col
        reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d pad expand
        view reshape_as expand_as copy_ alias lift_fresh_copy lift_fresh sym_numel sym_stride max_pool2d_with_indices
        max_pool3d_with_indices max_pool1d_with_indices adaptive_max_pool2d adaptive_max_pool3d adaptive_avg_pool2d
        adaptive_avg_pool3d sym_constrain_range sym_constrain_range_for_size as_tensor unsqueeze_ squeeze_ mish_ silu_ elu_ hardswish_
        hardsigmoid_ leaky_relu_ hardtanh_ relu6_ index_put_ add_ sub_ mul_ div_ to contiguous size dim item masked_fill_ upsample_nearest_exact1d
        upsample_nearest_exact2d upsample_nearest_exact3d type_as empty_permuted channel_shuffle glu dim_order fft_fft fft_ifft fft_fft2
        fft_ifft2 fft_fftn fft_ifftn fft_rfft fft_irfft fft_rfft2 fft_irfft2 fft_rfftn fft_irfftn fft_fftshift fft_ifftshift
        linalg_vector_norm linalg_norm linalg_matrix_norm linalg_cross linalg_inv linalg_inv_ex special_expit special_erf copy
        fill_ as_strided lstm gru rnn_tanh rnn_relu detach_ bernoulli bernoulli_ normal_ uniform_ exponential_ gelu_ new_zeros new_ones new_full new_empty arange_like""",
    "torch.nn.functional": """adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
        adaptive_max_pool3d adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices affine_grid alpha_dropout avg_pool1d
        avg_pool2d avg_pool3d batch_norm bilinear celu channel_shuffle conv1d conv2d conv3d conv_transpose1d conv_transpose2d
        conv_transpose3d cosine_similarity dropout dropout1d dropout2d dropout3d elu elu_ embedding feature_alpha_dropout fold
        gelu glu grid_sample group_norm hardshrink hardsigmoid hardswish hardtanh hardtanh_ instance_norm interpolate layer_norm
        leaky_relu leaky_relu_ linear local_response_norm log_softmax logsigmoid lp_pool1d lp_pool2d lp_pool3d max_pool1d max_pool2d
        max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices mish normalize one_hot pad
        pairwise_distance pixel_shuffle pixel_unshuffle prelu relu relu_ relu6 rms_norm rrelu rrelu_ scaled_dot_product_attention selu
        selu_ sigmoid silu softmax softmin softplus softshrink softsign tanh tanhshrink threshold threshold_ unfold upsample
        upsample_bilinear upsample_nearest gumbel_softmax""",
    "torch._C._nn": """gelu gelu_ linear pad one_hot hardswish hardswish_ hardsigmoid hardsigmoid_ hardtanh hardtanh_ elu elu_ leaky_relu
        leaky_relu_ log_sigmoid softplus softshrink mish mish_ silu silu_ relu6 relu6_ glu avg_pool2d avg_pool3d adaptive_avg_pool2d
        adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d reflection_pad1d reflection_pad2d reflection_pad3d
        replication_pad1d replication_pad2d replication_pad3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
        upsample_bilinear2d upsample_bicubic2d upsample_linear1d upsample_trilinear3d scaled_dot_product_attention flatten_dense_tensors
        pixel_shuffle""",
    "torch.functional": """atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors cartesian_prod cdist einsum meshgrid norm split stft
        istft tensordot unique unique_consecutive broadcast_shapes""",
    "torch.linalg": "norm vector_norm matrix_norm cross inv det matmul multi_dot diagonal svdvals",
    "torch.special": "expit erf erfc erfinv exp2 expm1 log1p log_softmax softmax logit logsumexp round sinc xlogy i0 ndtr gammaln digamma",
    "torch.fft": """fft ifft fft2 ifft2 fftn ifftn rfft irfft rfft2 irfft2 rfftn irfftn hfft ihfft hfft2 ihfft2 fftshift ifftshift fftfreq
        rfftfreq""",
    "torchvision": "nms roi_align",
    "script": """__getitem__ __and__ __or__ __xor__ __not__ __is__ __isnot__ __contains__ __range_length __derive_index __round_to_zero_floordiv
        _set_item _unwrap_optional _get_tracing_state Int IntImplicit Float FloatImplicit Bool ScalarImplicit Complex ComplexImplicit
        Delete append extend insert pop reverse remove sort clear copy list dict keys values items get setdefault update popitem len str format
        warn floordiv mod neg numel size dim stride is_floating_point is_complex is_contiguous index count sorted join split strip
        replace startswith endswith lower upper find isdigit slice tensor_split item degrees radians fabs to manual_seed
        autocast_to_full_precision autocast_to_reduced_precision get_device cpu is_autocast_enabled is_nested storage_offset
        is_grad_enabled is_scripting ge le sub add mul div equal""",
    "prim": """CallMethod CallFunction Constant DictConstruct GetAttr SetAttr If Loop ListConstruct ListUnpack NumToTensor Print
        RaiseException TupleConstruct TupleIndex TupleSlice TupleUnpack Uninitialized abs max min device dtype is_cuda is_cpu is_nested is_sparse is_mkldnn is_quantized
        is_mps is_xpu is_meta isinstance itemsize layout ndim requires_grad data shape unchecked_cast unchecked_unwrap_optional min_max type
        annotate Enter Exit CreateObject EnumName EnumValue Guard tolist is_ipu name index unpackage grad sqrt""",
    "methods": """detach_ bernoulli bernoulli_ uniform_ normal_ abs abs_ add add_ addcdiv addcdiv_ addcmul addcmul_ all amax amin aminmax any argmax argmin argsort baddbmm bfloat16 bmm bool
        broadcast_to byte ceil ceil_ chunk clamp clamp_ clamp_max clamp_max_ clamp_min clamp_min_ clip clip_ clone contiguous
        copy_ cos cosh count_nonzero cpu cross cummax cummin cumprod cumsum detach diag diag_embed diagonal diff dim dist div div_ divide
        dot double dsplit eq erf exp exp_ exp2 expand expand_as expm1 flatten flip fliplr flipud float float_power floor floor_
        floor_divide fmax fmin fmod frac gather ge gt half hsplit imag index_add index_add_ index_copy index_copy_ index_fill
        index_put index_put_ index_select int inverse isclose isfinite isinf isnan item kthvalue le lerp lerp_ log log_ log10 log1p
        log2 log_softmax logaddexp logical_and logical_not logical_or logical_xor logit logsumexp long lt masked_fill masked_fill_ masked_scatter masked_select
        matmul max maximum mean median min minimum mm moveaxis movedim mul mul_ multiply mv nan_to_num nanmean nansum narrow ndimension ne
        neg neg_ nelement new_empty new_full new_ones new_tensor new_zeros nonzero norm numel permute pow pow_ prod quantile ravel real
        reciprocal relu relu_ remainder renorm repeat repeat_interleave reshape reshape_as roll rot90 round round_ rsqrt
        rsqrt_ scatter scatter_ scatter_add scatter_add_ scatter_reduce select select_scatter short sigmoid sigmoid_ sign sin sinh size slice_scatter softmax
        sort split split_with_sizes sqrt sqrt_ square square_ squeeze squeeze_ std storage_offset stride sub sub_ subtract sum swapaxes swapdims t take
        take_along_dim tan tanh tanh_ tensor_split tile to topk trace transpose transpose_ tril triu true_divide trunc type_as
        unbind unflatten unfold unique unsqueeze unsqueeze_ var view view_as vsplit where zero_ is_contiguous is_floating_point is_complex
        append extend insert pop reverse items keys values get count index copy H T""",
    "attributes": """T mT H mH real imag shape dtype device layout ndim requires_grad is_cuda is_cpu is_meta is_mps is_xpu is_sparse is_quantized is_nested
        itemsize nbytes is_leaf data""",
}
ALSO = {
    "is_",
    "is_not",
    "as_strided",
    "fill_",
    "values",
    "index",
    "numel",
    "storage_offset",
    "is_contiguous",
    "is_floating_point",
    "is_complex",
    "is_tensor",
    "item",
}
"""Of lists and dicts, or of no harm, though their names look like others'."""


def in_sources():
    """What the source of the zoos' networks calls: functions by their space, and methods."""
    found, methods = defaultdict(set), set()
    for folder in SOURCES:
        for path in (SITE / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Attribute):
                    continue
                space = SPACES.get(ast.unparse(node.value))
                if space is None:
                    methods.add(node.attr)
                else:
                    found[space].add(node.attr)
    return found, methods


def in_archives():
    """The operators of ATen and torchvision in exported programs and TorchScript archives."""
    found = defaultdict(set)
    for name in ARCHIVES:
        network, images = load(name).eval(), torch.rand(1, 3, 224, 224)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            program = torch.export.export(network, (images,), strict=False)
            targets = [node.target for node in program.graph.nodes]
            kinds = [target._schema.name for target in targets if isinstance(target, torch._ops.OpOverload)]
            for scripted in (True, False):
                path = Path(folder) / "network"
                try:
                    script = torch.jit.script(network) if scripted else torch.jit.trace(network, images, strict=False)
                    script.save(path)
                except Exception as error:
                    print(name, "has no archive:", str(error).splitlines()[0])
                    continue
                kinds += operators_of(torch.jit.load(path))
            for kind in kinds:
                space, _, short = kind.partition("::")
                found[space].add(short)
    return found


def wanted(name):
    return name in ALSO or name in UNDERSCORED or not EXCLUDED.search(name)


def table():
    functions, methods = in_sources()
    archived = in_archives()
    result = {}
    for space in _NAMESPACES:
        names = functions.get(space, set()) | set(KIN.get(space, "").split())
        result[space] = sorted(name for name in names if wanted(name) and _function_in(space, name) is not None)
    own = set(dir(torch._C.TensorBase)) | set(dir(list)) | set(dir(dict))
    result["methods"] = sorted({name for name in set(KIN["methods"].split()) if wanted(name) and name in own})
    print("methods in sources that are not listed:", *sorted(name for name in (methods & own) - set(result["methods"])))
    result["attributes"] = sorted(KIN["attributes"].split())
    names = {name for space in ("torch", "torch.nn.functional", "torch._C._nn", "methods") for name in result[space]}
    names |= set(KIN["torch"].split()) | {f"{name}_" for name in names} | UNDERSCORED
    names |= {
        f"{space.removeprefix('torch.')}_{name}"
        for space in ("torch.linalg", "torch.special", "torch.fft")
        for name in result[space]
    }
    print("operators of archives that are not listed:", *sorted(archived["aten"] - names - set(KIN["script"].split())))
    result["aten"] = sorted(name for name in names if wanted(name) and hasattr(torch.ops.aten, name))
    result["torchvision"] = sorted(KIN["torchvision"].split())
    result["script"] = sorted(KIN["script"].split())
    result["prim"] = sorted(KIN["prim"].split())
    print("instructions of archives that are not listed:", *sorted(archived["prim"] - set(result["prim"])))
    return result


def main():
    warnings.simplefilter("ignore")
    assert torchvision.__version__
    rows = [f"{json.dumps(key)}: {json.dumps(names)}" for key, names in table().items()]
    TARGET.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
