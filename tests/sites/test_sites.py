"""The stages of well-known networks, line by line, as a person draws them; and how some of them are selected."""

import pytest
import torch

import se_inject as si
from se_inject.errors import NoSites, SiteNotFound
from se_inject.sites.site import HeldBack
from tests.common import build

STAGES = {
    "torchvision:resnet18": """
        layer1 | 4 | 64 | 2 residual
        layer2 | 8 | 128 | 2 residual
        layer3 | 16 | 256 | 2 residual
        layer4 | 32 | 512 | 2 residual
    """,
    "torchvision:resnet50": """
        layer1 | 4 | 256 | 3 residual
        layer2 | 8 | 512 | 4 residual
        layer3 | 16 | 1024 | 6 residual
        layer4 | 32 | 2048 | 3 residual
    """,
    "torchvision:resnext50_32x4d": """
        layer1 | 4 | 256 | 3 residual
        layer2 | 8 | 512 | 4 residual
        layer3 | 16 | 1024 | 6 residual
        layer4 | 32 | 2048 | 3 residual
    """,
    "torchvision:wide_resnet50_2": """
        layer1 | 4 | 256 | 3 residual
        layer2 | 8 | 512 | 4 residual
        layer3 | 16 | 1024 | 6 residual
        layer4 | 32 | 2048 | 3 residual
    """,
    "torchvision:mobilenet_v2": """
        features.1 | 2 | 16 | 1 residual
        features.2 … features.3 | 4 | 24 | 2 residual
        features.4 … features.6 | 8 | 32 | 3 residual
        features.7 … features.13 | 16 | 64-96 | 7 residual
        features.14 … features.17 | 32 | 160-320 | 4 residual
    """,
    "torchvision:convnext_tiny": """
        features.1 | 4 | 96 | 3 residual
        features.3 | 8 | 192 | 3 residual
        features.5 | 16 | 384 | 9 residual
        features.7 | 32 | 768 | 3 residual
    """,
    "torchvision:vgg16": """
        features.1 … features.3 | 1 | 64 | 2 conv
        features.6 … features.8 | 2 | 128 | 2 conv
        features.11 … features.15 | 4 | 256 | 3 conv
        features.18 … features.22 | 8 | 512 | 3 conv
        features.25 … features.29 | 16 | 512 | 3 conv
    """,
    "torchvision:vgg16_bn": """
        features.2 … features.5 | 1 | 64 | 2 conv
        features.9 … features.12 | 2 | 128 | 2 conv
        features.16 … features.22 | 4 | 256 | 3 conv
        features.26 … features.32 | 8 | 512 | 3 conv
        features.36 … features.42 | 16 | 512 | 3 conv
    """,
    "torchvision:fcn_resnet50": """
        backbone.layer1 | 4 | 256 | 3 residual
        backbone.layer2 | 8 | 512 | 4 residual
        backbone.layer3 | 8 | 1024 | 6 residual
        backbone.layer4 | 8 | 2048 | 3 residual
    """,
    "torchvision:deeplabv3_resnet50": """
        backbone.layer1 | 4 | 256 | 3 residual
        backbone.layer2 | 8 | 512 | 4 residual
        backbone.layer3 | 8 | 1024 | 6 residual
        backbone.layer4 | 8 | 2048 | 3 residual
        classifier | 8 | 256 | 1 concat held
    """,
    "torchvision:efficientnet_b0": """
        features.1 | 2 | 16 | 1 residual held
        features.2 | 4 | 24 | 2 residual held
        features.3 | 8 | 40 | 2 residual held
        features.4 | 16 | 80 | 3 residual held
        features.5 | 16 | 112 | 3 residual held
        features.6 | 32 | 192 | 4 residual held
        features.7 | 32 | 320 | 1 residual held
    """,
    "torchvision:mobilenet_v3_large": """
        features.1 | 2 | 16 | 1 residual
        features.2 … features.3 | 4 | 24 | 2 residual
        features.4 … features.6 | 8 | 40 | 3 residual held
        features.7 … features.12 | 16 | 80-112 | 6 residual
        features.13 … features.15 | 32 | 160 | 3 residual held
    """,
    "torchvision:regnet_y_400mf": """
        trunk_output.block1 | 4 | 48 | 1 residual held
        trunk_output.block2 | 8 | 104 | 3 residual held
        trunk_output.block3 | 16 | 208 | 6 residual held
        trunk_output.block4 | 32 | 440 | 6 residual held
    """,
    "torchvision:googlenet": """
        inception3a … inception3b | 8 | 256-480 | 2 concat
        inception4a … inception4e | 16 | 512-832 | 5 concat
        inception5a … inception5b | 32 | 832-1024 | 2 concat
    """,
    "torchvision:inception_v3": """
        Mixed_5b … Mixed_5d | 8 | 256-288 | 3 concat
        Mixed_6a … Mixed_6e | 16 | 768 | 5 concat
        Mixed_7a … Mixed_7c | 32 | 1280-2048 | 3 concat
    """,
    "torchvision:densenet121": """
        features.denseblock1 | 4 | 256 | 1 concat
        features.denseblock2 | 8 | 512 | 1 concat
        features.denseblock3 | 16 | 1024 | 1 concat
        features.denseblock4 | 32 | 1024 | 1 concat
    """,
    "torchvision:squeezenet1_1": """
        features.3 … features.4 | 4 | 128 | 2 concat
        features.6 … features.7 | 8 | 256 | 2 concat
        features.9 … features.12 | 16 | 384-512 | 4 concat
    """,
    "torchvision:shufflenet_v2_x1_0": """
        stage2 | 8 | 116 | 4 concat
        stage3 | 16 | 232 | 8 concat
        stage4 | 32 | 464 | 4 concat
    """,
    "torchvision:mnasnet0_5": """
        layers.8 | 4 | 16 | 3 residual
        layers.9 | 8 | 24 | 3 residual
        layers.10 | 16 | 40 | 3 residual
        layers.11 | 16 | 48 | 2 residual
        layers.12 | 32 | 96 | 4 residual
        layers.13 | 32 | 160 | 1 residual
    """,
    "torchvision:alexnet": """
        features.1 | 4 | 64 | 1 conv
        features.4 | 8 | 192 | 1 conv
        features.7 … features.11 | 16 | 256-384 | 3 conv
    """,
    "timm:resnet50": """
        layer1 | 4 | 256 | 3 residual
        layer2 | 8 | 512 | 4 residual
        layer3 | 16 | 1024 | 6 residual
        layer4 | 32 | 2048 | 3 residual
    """,
    "timm:resnetv2_50": """
        stages.0 | 4 | 256 | 3 residual
        stages.1 | 8 | 512 | 4 residual
        stages.2 | 16 | 1024 | 6 residual
        stages.3 | 32 | 2048 | 3 residual
    """,
    "timm:seresnet50": """
        layer1 | 4 | 256 | 3 residual held
        layer2 | 8 | 512 | 4 residual held
        layer3 | 16 | 1024 | 6 residual held
        layer4 | 32 | 2048 | 3 residual held
    """,
    "timm:hrnet_w18_small": """
        layer1 | 4 | 128 | 1 residual
        stage2 | 4-8 | 16-32 | 4 residual
        stage3 | 4-16 | 16-64 | 6 residual
        stage4 | 4-32 | 16-128 | 8 residual
        incre_modules | 4-32 | 128-1024 | 4 residual
    """,
    "timm:dla34": """
        level2 | 4 | 64 | 2 residual
        level3 | 8 | 128 | 4 residual
        level4 | 16 | 256 | 4 residual
        level5 | 32 | 512 | 2 residual
    """,
    "timm:res2net50_14w_8s": """
        layer1 | 4 | 256 | 3 residual
        layer2 | 8 | 512 | 4 residual
        layer3 | 16 | 1024 | 6 residual
        layer4 | 32 | 2048 | 3 residual
    """,
    "timm:cspresnet50": """
        stages.0 | 4 | 128 | 3 residual
        stages.1 | 8 | 256 | 3 residual
        stages.2 | 16 | 512 | 5 residual
        stages.3 | 32 | 1024 | 2 residual
    """,
    "timm:dpn48b": """
        features.conv2_1 … features.conv2_3 | 4 | 112-144 | 3 concat
        features.conv3_1 … features.conv3_4 | 8 | 224-320 | 4 concat
        features.conv4_1 … features.conv4_6 | 16 | 352-512 | 6 concat
        features.conv5_1 … features.conv5_3 | 32 | 704-832 | 3 concat
    """,
    "timm:inception_resnet_v2": """
        mixed_5b | 8 | 320 | 1 concat
        repeat | 8 | 320 | 10 residual
        mixed_6a | 16 | 1088 | 1 concat
        repeat_1 | 16 | 1088 | 20 residual
        mixed_7a | 32 | 2080 | 1 concat
        repeat_2 | 32 | 2080 | 9 residual
        block8 | 32 | 2080 | 1 residual
    """,
    "timm:nasnetalarge": """
        cell_stem_0 … cell_stem_1 | 4 | 84-168 | 2 concat
        cell_stem_1 … cell_5 | 8 | 336-1008 | 7 concat
        reduction_cell_0 … cell_11 | 16 | 1344-2016 | 7 concat
        reduction_cell_1 … cell_17 | 32 | 2688-4032 | 7 concat
    """,
    "timm:xception41": """
        blocks.0 | 4 | 128 | 1 residual
        blocks.1 | 8 | 256 | 1 residual
        blocks.2 … blocks.10 | 16 | 728 | 9 residual
        blocks.11 … blocks.12 | 32 | 1024-2048 | 2 residual
    """,
    "timm:vovnet39a": """
        stem.0 … stem.1 | 2 | 64 | 2 conv
        stem.2 | 4 | 128 | 1 conv
        stages.0 | 4 | 128-256 | 6 conv
        stages.1 | 8 | 160-512 | 6 conv
        stages.2 | 16 | 192-768 | 12 conv
        stages.3 | 32 | 224-1024 | 12 conv
    """,
    "timm:repvgg_a0": """
        stem | 2 | 48 | 1 sum
        stages.0 | 4 | 48 | 2 sum
        stages.1 | 8 | 96 | 4 sum
        stages.2 | 16 | 192 | 14 sum
        stages.3 | 32 | 1280 | 1 sum
    """,
    "timm:mobilenetv1_100": """
        bn1 | 2 | 32 | 1 conv
        blocks.0 | 2 | 64 | 1 conv
        blocks.1 | 4 | 128 | 2 conv
        blocks.2 | 8 | 256 | 2 conv
        blocks.3 | 16 | 512 | 6 conv
        blocks.4 | 32 | 1024 | 2 conv
    """,
    "timm:convmixer_768_32": """
        blocks | 7 | 768 | 32 residual
    """,
    "timm:fastvit_t8": """
        stem.0 | 2 | 48 | 1 sum
        stem.1 … stem.2 | 4 | 48 | 2 sum
        stages.0 | 4 | 48 | 2 residual
        stages.1 | 8 | 96 | 4 sum
        stages.2 | 16 | 192 | 6 sum
        stages.3 | 32 | 384 | 4 sum
        final_conv | 32 | 768 | 1 sum
    """,
    "timm:coatnet_0_224": """
        stages.0 | 4 | 96 | 2 residual held
        stages.1 | 8 | 192 | 3 residual held
        stages.2 | 16 | 384 | 5 residual
        stages.3 | 32 | 768 | 2 residual
    """,
    "timm:maxvit_tiny_tf_224": """
        stages.0 | 4 | 64 | 2 residual held
        stages.1 | 8 | 128 | 2 residual held
        stages.2 | 16 | 256 | 5 residual held
        stages.3 | 32 | 512 | 2 residual held
    """,
    "timm:efficientformer_l1": """
        stages.0 | 4 | 48 | 3 residual
        stages.1 | 8 | 96 | 2 residual
        stages.2 | 16 | 224 | 6 residual
        stages.3 | 32 | 448 | 3 residual
    """,
    "timm:convnextv2_atto": """
        stages.0 | 4 | 40 | 2 residual
        stages.1 | 8 | 80 | 2 residual
        stages.2 | 16 | 160 | 6 residual
        stages.3 | 32 | 320 | 2 residual
    """,
    "timm:resnest14d": """
        layer1 | 4 | 256 | 1 residual held
        layer2 | 8 | 512 | 1 residual held
        layer3 | 16 | 1024 | 1 residual held
        layer4 | 32 | 2048 | 1 residual held
    """,
    "timm:skresnet18": """
        layer1 | 4 | 64 | 2 residual held
        layer2 | 8 | 128 | 2 residual held
        layer3 | 16 | 256 | 2 residual held
        layer4 | 32 | 512 | 2 residual held
    """,
    "timm:nfnet_f0": """
        stages.0 | 4 | 256 | 1 residual held
        stages.1 | 8 | 512 | 2 residual held
        stages.2 | 16 | 1536 | 6 residual held
        stages.3 | 32 | 1536 | 3 residual held
    """,
    "timm:hgnet_tiny": """
        stages.0 | 4 | 224 | 1 concat
        stages.1 | 8 | 448 | 1 concat
        stages.2 | 16 | 512 | 2 residual held
        stages.3 | 32 | 768 | 1 concat
    """,
}
"""Path, stride, channels, sites and kind of the first; ``held`` if all of its sites are left out by default."""


def found_in(name):
    with torch.device("meta" if name.startswith("timm") else "cpu"):
        network = build(name).eval()
    return si.find_sites(network)


def told(stage):
    first, last = stage.strides[0], stage.strides[-1]
    stride = "-".join(dict.fromkeys(str(round(each[0])) for each in (first, last)))
    channels = "-".join(dict.fromkeys(str(each) for each in (min(stage.channels), max(stage.channels))))
    held = " held" if all(site.held_back for site in stage.sites) else ""
    return f"{stage.path} | {stride} | {channels} | {len(stage.sites)} {stage.sites[0].kind}{held}"


@pytest.mark.parametrize("name", STAGES)
def test_stages(name):
    expected = [line.strip() for line in STAGES[name].strip().splitlines()]
    assert [told(stage) for stage in found_in(name).table] == expected


def test_stages_are_numbered_in_the_order_of_the_data():
    table = found_in("torchvision:resnet50").table
    assert [(stage.number, stage.path, stage.aliases) for stage in table] == [
        (1, "layer1", ("C2",)),
        (2, "layer2", ("C3",)),
        (3, "layer3", ("C4",)),
        (4, "layer4", ("C5",)),
    ]


def test_the_sites_of_resnet50_are_its_last_norms():
    assert [site.address for site in found_in("torchvision:resnet50")] == [
        f"layer{stage}.{block}.bn3" for stage, blocks in enumerate((3, 4, 6, 3), 1) for block in range(blocks)
    ]


def test_attention_that_is_there_is_recognised():
    for name, count in (
        ("torchvision:efficientnet_b0", 16),
        ("timm:seresnet50", 16),
        ("torchvision:regnet_y_400mf", 16),
    ):
        found = found_in(name)
        assert sum(site.held_back is HeldBack.ATTENTION for site in found.all_sites) == count
        with pytest.raises(NoSites, match="already has attention"):
            found.everything()
        assert len(found.everything(attended=True)) == count


def test_partly_attended():
    found = found_in("torchvision:mobilenet_v3_large")
    assert len(found.everything()) == 7 and len(found.everything(attended=True)) == 15


def test_a_head_is_chosen_by_number_or_path_alone():
    found = found_in("torchvision:deeplabv3_resnet50")
    assert {site.address for site in found.all_sites if site.held_back is HeldBack.NECK} == {"classifier.0.project"}
    assert len(found.everything()) == len(found.stages("all")) == 16
    assert [site.address for site in found.stages(5)] == ["classifier.0.project"]
    assert [site.address for site in found.stages("classifier")] == ["classifier.0.project"]
    assert len(found.stages("all-but-last")) == 13


def test_layers_of_a_dense_block_are_chosen_by_address():
    found = found_in("torchvision:densenet121")
    layers = [site for site in found.all_sites if site.held_back is HeldBack.DENSE]
    assert len(layers) == 6 + 12 + 24 + 16 and {site.channels for site in layers} == {32}
    assert len(found.at("features.denseblock2.denselayer*")) == 12


def test_units_of_units_are_chosen_by_address():
    found = found_in("timm:cspresnet50")
    outer = [site.address for site in found.all_sites if site.held_back is HeldBack.NESTED]
    assert len(outer) == 4 and outer[0] in [site.address for site in found.at(outer[0])]


def test_stems_have_no_stage():
    stem = found_in("torchvision:resnet50").all_sites[0]
    assert (stem.address, stem.stage, stem.held_back) == ("relu", None, HeldBack.OUTSIDE)


@pytest.mark.parametrize("names", [(5,), ("2-7",), ("layer9",), ("",)])
def test_stages_that_are_not_there(names):
    with pytest.raises(SiteNotFound):
        found_in("torchvision:resnet18").stages(*names)


def test_a_name_that_the_authors_forward_reads_is_left_to_it():
    network = build("timm:rexnet_100").eval()  # its blocks without SE have `self.se = None` and ask for it
    plan = si.plan(network, attended=True)
    assert {step.block_name for step in plan.steps} == {"se", "se_block"}
    assert si.verify(network, plan.apply(network), fresh=True).passed
