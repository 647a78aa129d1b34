"""The networks of the strangers' census: packages on PyPI besides torchvision and timm, with random weights.

``PACKAGES`` is the table: what ``pip`` calls the package → a function that imports it and returns, by name, functions
that make a network and its inputs. Networks that are alike but for their size stand once in it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Entry = Callable[[], tuple[nn.Module, tuple[Any, ...]]]
PACKAGES: dict[str, Callable[[], dict[str, Entry]]] = {}


def package(name: str) -> Callable[[Callable[[], dict[str, Entry]]], Any]:
    """Put the function below into the table."""
    return lambda function: PACKAGES.setdefault(name, function)


def numbers(*shape: int) -> torch.Tensor:
    """Normal numbers, the same ones every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


IMAGE, SMALL, LARGE = (2, 3, 64, 64), (2, 3, 32, 32), (2, 3, 128, 128)
SCAN = (2, 1, 32, 32, 32)
WAVE = (2, 1, 4000)


def made(kind: Any, *args: Any, on: Any = IMAGE, **options: Any) -> Entry:
    """Say how a network is made, and the shapes of its arguments: one, a list of several, or a function that makes them."""

    def make() -> tuple[nn.Module, tuple[Any, ...]]:
        network = kind(*args, **options)
        if callable(on):
            return network, on()
        return network, tuple(numbers(*shape) for shape in (on if isinstance(on, list) else [on]))

    return make


@package("segmentation-models-pytorch")
def _() -> dict[str, Entry]:
    import segmentation_models_pytorch as smp

    whole = (
        "Unet",
        "UnetPlusPlus",
        "MAnet",
        "Linknet",
        "FPN",
        "PSPNet",
        "PAN",
        "DeepLabV3",
        "DeepLabV3Plus",
        "UPerNet",
    )
    encoders = ("mobilenet_v2", "densenet121", "efficientnet-b0", "vgg11_bn", "dpn68", "xception", "inceptionv4", "mit_b0",
                "mobileone_s0", "timm-regnetx_002", "se_resnet50", "resnext50_32x4d")  # fmt: skip
    plain = {
        name: made(
            getattr(smp, name), "resnet18", encoder_weights=None, on=(2, 3, 256, 256) if name == "PAN" else IMAGE
        )
        for name in whole
    }
    return plain | {
        f"Unet {name}": made(smp.Unet, name, encoder_weights=None, on=LARGE if "ception" in name else IMAGE)
        for name in encoders
    }


@package("pretrainedmodels")
def _() -> dict[str, Entry]:
    import pretrainedmodels

    names = {"bninception": 224, "xception": 96, "nasnetamobile": 224, "se_resnet50": 224}
    return {
        name: made(pretrainedmodels.__dict__[name], num_classes=1000, pretrained=None, on=(2, 3, side, side))
        for name, side in names.items()
    }


@package("efficientnet-pytorch")
def _() -> dict[str, Entry]:
    from efficientnet_pytorch import EfficientNet

    return {name: made(EfficientNet.from_name, name) for name in ("efficientnet-b0", "efficientnet-b3")}


_CV = [
    "resnet10",
    "preresnet10",
    "sepreresnet10",
    "diracnet18v2",
    "sharesnet18",
    "peleenet",
    "condensenet74_c4_g4",
    "darknet_ref",
    "channelnet",
    "bagnet9",
    "dla34",
    "espnetv2_wd2",
    "dicenet_wd5",
    "hrnet_w18_small_v1",
    "vovnet27s",
    "hardnet39ds",
    "squeezenet_v1_1",
    "sqnxt23_w1",
    "shufflenet_g1_wd4",
    "shufflenetv2_wd2",
    "menet108_8x1_g3",
    "mobilenet_wd4",
    "mobilenetv2_wd4",
    "igcv3_wd4",
    "ghostnet",
    "mnasnet_small",
    "darts",
    "fbnet_cb",
    "spnasnet",
    "mixnet_s",
    "octresnet10_ad2",
    "regnetx002",
    "scnet50",
    "msdnet22",
    "resattnet56",
    "tresnet_m",
    "bn_vgg11",
]
_CV_SMALL = [
    "nin_cifar10",
    "resnet20_cifar10",
    "preresnet20_cifar10",
    "densenet40_k12_cifar10",
    "pyramidnet110_a48_cifar10",
    "ror3_56_cifar10",
    "rir_cifar10",
    "resdropresnet20_cifar10",
    "shakeshakeresnet20_2x16d_cifar10",
    "shakedropresnet20_cifar10",
    "fractalnet_cifar10",
    "wrn20_10_1bit_cifar10",
    "xdensenet40_2_k24_bc_cifar10",
    "diaresnet20_cifar10",
]
_CV_BACKBONES = [
    "fcn8sd_resnetd50b_voc",
    "pspnet_resnetd50b_voc",
    "deeplabv3_resnetd50b_voc",
    "icnet_resnetd50b_cityscapes",
    "bisenet_resnet18_celebamaskhq",
    "danet_resnetd50b_cityscapes",
]
_CV_SCENES = [
    "fastscnn_cityscapes",
    "cgnet_cityscapes",
    "dabnet_cityscapes",
    "sinet_cityscapes",
    "fpenet_cityscapes",
    "ctxnet_cityscapes",
    "lednet_cityscapes",
    "esnet_cityscapes",
    "edanet_cityscapes",
    "enet_cityscapes",
    "erfnet_cityscapes",
    "linknet_cityscapes",
    "segnet_cityscapes",
    "unet_cityscapes",
    "simplepose_resnet18_coco",
    "lwopenpose2d_mobilenet_cmupan_coco",
    "centernet_resnet18_voc",
    "lffd20x5s320v2_widerface",
]


@package("pytorchcv")
def _() -> dict[str, Entry]:
    from pytorchcv.model_provider import get_model

    found = {
        name: made(get_model, name, on=(2, 3, 64, 64) if name == "tresnet_m" else (2, 3, 224, 224)) for name in _CV
    }
    found |= {name: made(get_model, name, on=SMALL) for name in _CV_SMALL}
    found |= {
        name: made(get_model, name, pretrained_backbone=False, in_size=(128, 128), on=LARGE) for name in _CV_BACKBONES
    }
    found |= {name: made(get_model, name, in_size=(128, 128), on=LARGE) for name in _CV_SCENES}
    found["superpointnet"] = made(get_model, "superpointnet", on=(2, 1, 64, 64))
    return found


@package("monai")
def _() -> dict[str, Entry]:
    from monai.networks import nets

    unet = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
    return {
        "UNet": made(nets.UNet, **unet, channels=(8, 16, 32), strides=(2, 2), num_res_units=2, on=SCAN),
        "UNet plain": made(nets.UNet, **unet, channels=(8, 16, 32), strides=(2, 2), on=SCAN),
        "DynUNet": made(nets.DynUNet, **unet, kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2], on=SCAN),
        "DynUNet res": made(
            nets.DynUNet, **unet, kernel_size=[3] * 3, strides=[1, 2, 2], upsample_kernel_size=[2, 2], res_block=True, on=SCAN
        ),
        "BasicUNet": made(nets.BasicUNet, 3, 1, 2, (8, 8, 16, 16, 32, 8), on=SCAN),
        "BasicUNetPlusPlus": made(nets.BasicUNetPlusPlus, 3, 1, 2, (8, 8, 16, 16, 32, 8), on=SCAN),
        "AttentionUnet": made(nets.AttentionUnet, 3, 1, 2, (8, 16, 32), (2, 2), on=SCAN),
        "SegResNet": made(nets.SegResNet, init_filters=8, out_channels=2, on=SCAN),
        "SegResNetVAE": made(nets.SegResNetVAE, (32, 32, 32), init_filters=8, out_channels=2, on=SCAN),
        "SegResNetDS": made(nets.SegResNetDS, init_filters=8, out_channels=2, dsdepth=2, on=SCAN),
        "VNet": made(nets.VNet, on=SCAN),
        "HighResNet": made(nets.HighResNet, 3, 1, 2, on=(1, 1, 16, 16, 16)),
        "DenseNet121": made(nets.DenseNet121, 3, 1, 2, on=SCAN),
        "resnet18": made(nets.resnet18, n_input_channels=1, num_classes=2, on=SCAN),
        "SEResNet50": made(nets.SEResNet50, spatial_dims=2, in_channels=3, num_classes=2),
        "EfficientNetBN": made(nets.EfficientNetBN, "efficientnet-b0", pretrained=False),
        "FlexibleUNet": made(nets.FlexibleUNet, 3, 2, "efficientnet-b0", pretrained=False),
        "Regressor": made(nets.Regressor, (1, 32, 32), (2,), (8, 16), (2, 2), on=(2, 1, 32, 32)),
        "Discriminator": made(nets.Discriminator, (1, 32, 32), (8, 16), (2, 2), on=(2, 1, 32, 32)),
        "AutoEncoder": made(nets.AutoEncoder, 2, 1, 1, (8, 16), (2, 2), num_res_units=2, on=(2, 1, 32, 32)),
        "VarAutoEncoder": made(nets.VarAutoEncoder, 2, (1, 32, 32), 1, 4, (8, 16), (2, 2), on=(2, 1, 32, 32)),
        "RegUNet": made(nets.RegUNet, 3, 1, 8, 2, on=SCAN),
        "GlobalNet": made(nets.GlobalNet, image_size=[32, 32, 32], spatial_dims=3, in_channels=1, num_channel_initial=8, depth=2, on=SCAN),
        "DiffusionModelUNet": made(
            nets.DiffusionModelUNet, 2, 1, 1, (1, 1), (8, 16), (False, False), norm_num_groups=4,
            on=lambda: (numbers(2, 1, 32, 32), torch.tensor([3, 5]))),
        "AutoencoderKL": made(
            nets.AutoencoderKL, 2, channels=(8, 16), num_res_blocks=(1, 1), attention_levels=(False, False), norm_num_groups=4,
            with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False, on=(2, 1, 32, 32)),
        "VQVAE": made(nets.VQVAE, 2, 1, 1, (8, 16), num_res_layers=1, num_res_channels=(8, 16), num_embeddings=8, embedding_dim=4,
                      downsample_parameters=((2, 4, 1, 1),) * 2, upsample_parameters=((2, 4, 1, 1, 0),) * 2, on=(2, 1, 32, 32)),
        "HoVerNet": made(nets.HoVerNet, out_classes=3, on=(1, 3, 256, 256)),
        "MILModel": made(nets.MILModel, 2, mil_mode="mean", pretrained=False, on=(2, 2, 3, 32, 32)),
        "PatchDiscriminator": made(nets.PatchDiscriminator, 2, 8, 1, num_layers_d=2, on=(2, 1, 32, 32)),
        "MedNeXt": made(nets.MedNeXt, 3, init_filters=8, in_channels=1, out_channels=2, on=SCAN),
    }  # fmt: skip


@package("kornia")
def _() -> dict[str, Entry]:
    from kornia import feature

    patch = (2, 1, 32, 32)
    found = {
        name: made(getattr(feature, name), pretrained=False, on=patch)
        for name in ("HardNet", "SOSNet", "TFeat", "HyNet")
        if hasattr(feature, name)
    }
    found["DISK"] = made(lambda: feature.DISK().unet)
    found["KeyNet"] = made(feature.KeyNet, pretrained=False, on=(2, 1, 64, 64))
    found["LoFTR backbone"] = made(lambda: feature.LoFTR(None).backbone, on=(2, 1, 64, 64))
    from kornia.models.dexined import DexiNed

    found["DexiNed"] = made(DexiNed, pretrained=False)
    return found


@package("facenet-pytorch")
def _() -> dict[str, Entry]:
    import facenet_pytorch
    from facenet_pytorch.models import mtcnn

    face = {"pretrained": False}
    return {
        "InceptionResnetV1": made(
            facenet_pytorch.InceptionResnetV1, pretrained=None, classify=True, num_classes=4, on=(2, 3, 160, 160)
        ),
        "PNet": made(mtcnn.PNet, **face),
        "RNet": made(mtcnn.RNet, **face, on=(2, 3, 24, 24)),
        "ONet": made(mtcnn.ONet, **face, on=(2, 3, 48, 48)),
    }


@package("ultralytics")
def _() -> dict[str, Entry]:
    from ultralytics.nn import tasks

    kinds = {
        "-cls": tasks.ClassificationModel,
        "-seg": tasks.SegmentationModel,
        "-pose": tasks.PoseModel,
        "-obb": tasks.OBBModel,
    }
    names = [
        "yolov3-tiny",
        "yolov5n",
        "yolov6n",
        "yolov8n",
        "yolov9t",
        "yolov9c",
        "yolov10n",
        "yolo11n",
        "yolo12n",
        "yolo26n",
        "yolov8n-cls",
        "yolov8n-seg",
        "yolov8n-pose",
        "yolov8n-obb",
        "yolov8n-ghost",
        "yolo11n-cls",
        "yolov8-cls-resnet50",
        "yolov5n-p6",
    ]
    found = {}
    for name in names:
        kind = next((kind for suffix, kind in kinds.items() if suffix in name), tasks.DetectionModel)
        found[name] = made(kind, f"{name}.yaml", verbose=False)
    return found


@package("torchxrayvision")
def _() -> dict[str, Entry]:
    import torchxrayvision as xrv

    return {
        "DenseNet": made(xrv.models.DenseNet, weights=None, on=(2, 1, 64, 64)),
        "ResNetAE": made(
            lambda: importlib.import_module("torchxrayvision.autoencoders").ResNetAE(weights=None), on=(2, 1, 224, 224)
        ),
    }


@package("transformers")
def _() -> dict[str, Entry]:
    import transformers as t

    def config(name: str, suffix: str = "ForImageClassification", **options: Any) -> Entry:
        return made(lambda: getattr(t, f"{name}{suffix}")(getattr(t, f"{name}Config")(**options)))

    sizes = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 2, 1]}
    return {
        "ResNet": config("ResNet", embedding_size=8, **sizes),
        "ResNet basic": config("ResNet", embedding_size=8, layer_type="basic", **sizes),
        "ResNet model": config("ResNet", "Model", embedding_size=8, **sizes),
        "ResNet backbone": config("ResNet", "Backbone", embedding_size=8, out_features=["stage2", "stage4"], **sizes),
        "RegNet x": config("RegNet", embedding_size=8, groups_width=8, layer_type="x", **sizes),
        "RegNet y": config("RegNet", embedding_size=8, groups_width=8, layer_type="y", **sizes),
        "ConvNext": config("ConvNext", **sizes),
        "ConvNext model": config("ConvNext", "Model", **sizes),
        "ConvNextV2": config("ConvNextV2", **sizes),
        "MobileNetV1": config("MobileNetV1", depth_multiplier=0.25),
        "MobileNetV2": config("MobileNetV2", depth_multiplier=0.35),
        "MobileNetV2 segmentation": config("MobileNetV2", "ForSemanticSegmentation", depth_multiplier=0.35),
        "EfficientNet": config("EfficientNet", width_coefficient=0.5, depth_coefficient=0.5, hidden_dim=640),
        "Bit": config("Bit", embedding_size=32, hidden_sizes=[32, 64, 64, 96], depths=[1, 2, 2, 1], num_groups=8),
        "PoolFormer": config("PoolFormer", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]),
        "MobileViT": config(
            "MobileViT", image_size=64, hidden_sizes=[24, 32, 40], neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 64]
        ),
        "UperNet": made(
            lambda: t.UperNetForSemanticSegmentation(
                t.UperNetConfig(
                    backbone_config=t.ConvNextConfig(**sizes, out_features=["stage1", "stage2", "stage3", "stage4"]),
                    hidden_size=16,
                    auxiliary_in_channels=24,
                    auxiliary_channels=8,
                )
            )
        ),
        "HGNetV2": config("HGNetV2"),
        "TextNet": config("TextNet"),
        "SwiftFormer": config("SwiftFormer"),
        "LevIT": config("Levit", image_size=64),
        "Cvt": config("Cvt"),
        "FocalNet": config("FocalNet", image_size=64, embed_dim=16),
        "SuperPoint": config("SuperPoint", "ForKeypointDetection"),
        "Encodec": made(
            lambda: (
                t.EncodecModel(
                    t.EncodecConfig(num_filters=8, upsampling_ratios=[4, 2], hidden_size=16, codebook_dim=16)
                ).encoder
            ),
            on=WAVE,
        ),
        "Wav2Vec2 features": made(
            lambda: (
                t.Wav2Vec2Model(
                    t.Wav2Vec2Config(
                        conv_dim=[16] * 7,
                        hidden_size=16,
                        num_hidden_layers=1,
                        num_attention_heads=4,
                        intermediate_size=16,
                    )
                ).feature_extractor
            ),
            on=(2, 4000),
        ),
        "Univnet": made(lambda: t.UnivNetModel(t.UnivNetConfig(model_hidden_channels=8)), on=(2, 12, 100)),
    }


@package("diffusers")
def _() -> dict[str, Entry]:
    import diffusers as d

    two = {"block_out_channels": (16, 32), "norm_num_groups": 8}
    time = lambda: (numbers(2, 3, 32, 32), torch.tensor([3, 5]))  # noqa: E731
    text = lambda: (numbers(2, 4, 16, 16), torch.tensor([3, 5]), numbers(2, 5, 16))  # noqa: E731
    return {
        "UNet2DModel": made(
            d.UNet2DModel, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False, **two, on=time),
        "UNet2DModel attention": made(
            d.UNet2DModel, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            **two, attention_head_dim=8, on=time),
        "UNet2DConditionModel": made(
            d.UNet2DConditionModel, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=16, attention_head_dim=8, **two, on=text),
        "UNet3DConditionModel": made(
            d.UNet3DConditionModel, down_block_types=("DownBlock3D",) * 2, up_block_types=("UpBlock3D",) * 2, cross_attention_dim=16,
            attention_head_dim=8, **two, on=lambda: (numbers(2, 4, 3, 16, 16), torch.tensor([3, 5]), numbers(2, 5, 16))),
        "AutoencoderKL": made(
            d.AutoencoderKL, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            mid_block_add_attention=False, **two),
        "AutoencoderTiny": made(d.AutoencoderTiny, encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4),
        "VQModel": made(d.VQModel, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        mid_block_add_attention=False, num_vq_embeddings=16, **two),
        "ControlNetModel": made(
            d.ControlNetModel, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=16, attention_head_dim=8,
            conditioning_embedding_out_channels=(8, 16), **two, on=lambda: (*text(), numbers(2, 3, 32, 32))),
        "T2IAdapter": made(d.T2IAdapter, channels=(16, 32, 32, 32)),
        "AutoencoderDC": made(d.AutoencoderDC, latent_channels=4, encoder_block_types=("ResBlock",) * 2, decoder_block_types=("ResBlock",) * 2,
                              encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16), encoder_layers_per_block=(1, 1),
                              decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ())),
    }  # fmt: skip


@package("torchaudio")
def _() -> dict[str, Entry]:
    from torchaudio import models

    return {
        "ConvTasNet": made(
            models.ConvTasNet, enc_kernel_size=8, enc_num_feats=16, msk_num_feats=16, msk_num_hidden_feats=16, msk_num_layers=3,
            msk_num_stacks=2, on=WAVE),
        "Wav2Letter": made(models.Wav2Letter, num_classes=8, input_type="mfcc", num_features=13, on=(2, 13, 200)),
        "WaveRNN upsampling": made(lambda: models.WaveRNN([4, 4], 8, 16, n_res_block=3, n_freq=16, n_hidden=16).upsample, on=(2, 16, 20)),
        "Tacotron2 postnet": made(lambda: models.Tacotron2(n_mels=20).postnet, on=(2, 20, 50)),
        "wav2vec2 features": made(
            lambda: models.wav2vec2_base().feature_extractor, on=lambda: (numbers(2, 4000), torch.tensor([4000, 3000]))),
        "Conformer": made(models.Conformer, 16, 2, 16, 2, 7, on=lambda: (numbers(2, 20, 16), torch.tensor([20, 10]))),
    }  # fmt: skip


@package("braindecode")
def _() -> dict[str, Entry]:
    from braindecode import models

    names = [
        "EEGNet",
        "Deep4Net",
        "ShallowFBCSPNet",
        "EEGInceptionERP",
        "EEGInceptionMI",
        "EEGITNet",
        "EEGNeX",
        "EEGTCNet",
        "TIDNet",
        "ATCNet",
        "EEGSimpleConv",
        "FBCNet",
        "SPARCNet",
        "TSception",
        "USleep",
        "SincShallowNet",
        "SCCNet",
        "IFNet",
    ]
    signal = {"n_chans": 8, "n_outputs": 3, "n_times": 1000, "sfreq": 250}
    return {name: made(getattr(models, name), **signal, on=(2, 8, 1000)) for name in names if hasattr(models, name)}


@package("tsai")
def _() -> dict[str, Entry]:
    from tsai.models import FCN, InceptionTime, OmniScaleCNN, ResCNN, ResNet, XceptionTime

    series = (2, 3, 96)
    return {
        "InceptionTime": made(InceptionTime.InceptionTime, 3, 4, nf=8, on=series),
        "XceptionTime": made(XceptionTime.XceptionTime, 3, 4, nf=8, on=series),
        "ResNet": made(ResNet.ResNet, 3, 4, on=series),
        "FCN": made(FCN.FCN, 3, 4, on=series),
        "ResCNN": made(ResCNN.ResCNN, 3, 4, on=series),
        "OmniScaleCNN": made(OmniScaleCNN.OmniScaleCNN, 3, 4, 96, on=series),
    }


@package("dynamic-network-architectures")
def _() -> dict[str, Entry]:
    from dynamic_network_architectures.architectures import resnet, unet

    common = {"n_stages": 3, "features_per_stage": (8, 16, 32), "kernel_sizes": 3, "strides": (1, 2, 2), "num_classes": 2,
              "conv_bias": True, "norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"affine": True}, "nonlin": nn.LeakyReLU}  # fmt: skip
    three = {"conv_op": nn.Conv3d, "input_channels": 1, **common}
    return {
        "PlainConvUNet": made(unet.PlainConvUNet, **three, n_conv_per_stage=2, n_conv_per_stage_decoder=2, on=SCAN),
        "ResidualEncoderUNet": made(
            unet.ResidualEncoderUNet, **three, n_blocks_per_stage=2, n_conv_per_stage_decoder=1, on=SCAN
        ),
        "ResidualUNet": made(unet.ResidualUNet, **three, n_blocks_per_stage=2, n_conv_per_stage_decoder=2, on=SCAN),
        "ResNet18": made(resnet.ResNet18_CIFAR, 10, 3, on=SMALL),
        "ResNet50bn": made(resnet.ResNet50bn_CIFAR, 10, 3, on=SMALL),
    }


@package("open-clip-torch")
def _() -> dict[str, Entry]:
    from open_clip.modified_resnet import ModifiedResNet

    return {"ModifiedResNet": made(ModifiedResNet, [1, 2, 2, 1], 16, 2, image_size=64, width=8)}


@package("lightly")
def _() -> dict[str, Entry]:
    from lightly.models import ResNetGenerator

    return {name: made(ResNetGenerator, name, on=SMALL) for name in ("resnet-9", "resnet-18", "resnet-50")}


@package("spandrel")
def _() -> dict[str, Entry]:
    def arch(folder: str, name: str, *args: Any, on: Any = (1, 3, 32, 32), **options: Any) -> Entry:
        def build() -> nn.Module:
            module: Any = importlib.import_module(f"spandrel.architectures.{folder}")
            return getattr(module, name)(*args, **options)

        return made(build, on=on)

    return {
        "ESRGAN": arch("ESRGAN.__arch.RRDB", "RRDBNet", num_filters=16, num_blocks=2),
        "SRVGGNetCompact": arch("Compact.__arch.SRVGG", "SRVGGNetCompact", num_feat=16, num_conv=4),
        "RCAN": arch("RCAN", "RCAN", n_resgroups=2, n_resblocks=2, n_feats=16),
        "NAFNet": arch("NAFNet", "NAFNet", width=8, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]),
        "DnCNN": arch("DnCNN", "DnCNN", nb=5, nc=16, on=(1, 1, 32, 32)),
        "PLKSR": arch("PLKSR", "PLKSR", dim=16, n_blocks=3),
        "SPAN": arch("SPAN", "SPAN", num_in_ch=3, num_out_ch=3, feature_channels=16),
        "SAFMN": arch("SAFMN", "SAFMN", dim=16, n_blocks=2),
        "RealCUGAN": arch("RealCUGAN", "UpCunet2x", on=(1, 3, 48, 48)),
        "SwiftSRGAN": arch("SwiftSRGAN", "SwiftSRGAN", num_channels=16, num_blocks=3),
        "OmniSR": arch("OmniSR", "OmniSR", num_feat=16, res_num=1),
    }


@package("speechbrain")
def _() -> dict[str, Entry]:
    from speechbrain.lobes.models import conv_tasnet

    def lobe(module: str, name: str, *args: Any, on: Any, **options: Any) -> Entry:
        return made(
            lambda: getattr(importlib.import_module(f"speechbrain.lobes.models.{module}"), name)(*args, **options),
            on=on,
        )

    frames = (2, 50, 20)
    return {
        "ECAPA_TDNN": lobe(
            "ECAPA_TDNN", "ECAPA_TDNN", 20, channels=[32] * 4 + [96], attention_channels=8, lin_neurons=8, on=frames
        ),
        "Xvector": lobe("Xvector", "Xvector", in_channels=20, tdnn_channels=[16] * 5, on=frames),
        "ContextNet": lobe(
            "ContextNet",
            "ContextNet",
            on=(2, 50, 80),
            input_shape=[2, 50, 80],
            out_channels=16,
            conv_channels=[16] * 3,
            num_blocks=3,
            num_layers=2,
            strides=[1, 2, 1],
            residuals=[True] * 3,
        ),
        "ConvTasNet masks": made(conv_tasnet.MaskNet, 16, 16, 16, 3, 3, 2, 2, on=(2, 16, 100)),
        "ResNet": lobe("ResNet", "ResNet", input_size=20, channels=[8, 8, 16, 16], lin_neurons=8, on=frames),
        "HifiGAN": lobe(
            "HifiGAN",
            "HifiganGenerator",
            16,
            1,
            "1",
            [[1, 3, 5], [1, 3, 5]],
            [3, 5],
            [4, 4],
            16,
            [2, 2],
            on=(2, 16, 20),
        ),
        "CRDNN": lobe("CRDNN", "CRDNN", input_size=20, cnn_channels=[8, 8], rnn_neurons=8, dnn_neurons=8, on=frames),
    }


@package("asteroid")
def _() -> dict[str, Entry]:
    from asteroid import models

    return {
        "ConvTasNet": made(
            models.ConvTasNet,
            2,
            n_filters=16,
            n_blocks=3,
            n_repeats=2,
            bn_chan=16,
            hid_chan=16,
            skip_chan=16,
            on=(2, 4000),
        ),
        "SuDORMRFNet": made(
            models.SuDORMRFNet, 2, bn_chan=16, num_blocks=2, upsampling_depth=2, kernel_size=11, n_filters=16, on=WAVE
        ),
        "DCUNet": made(
            models.DCUNet,
            "DCUNet-10",
            stft_n_filters=256,
            stft_kernel_size=256,
            stft_stride=64,
            fix_length_mode="pad",
            on=WAVE,
        ),
        "DeMask": made(models.DeMask, on=WAVE),
    }


@package("fastai")
def _() -> dict[str, Entry]:
    import torchvision
    from fastai.vision.models import unet, xresnet

    return {
        "xresnet18": made(xresnet.xresnet18, n_out=10),
        "xresnext18": made(xresnet.xresnext18, n_out=10),
        "xse_resnet18": made(xresnet.xse_resnet18, n_out=10),
        "DynamicUnet": made(
            lambda: unet.DynamicUnet(nn.Sequential(*list(torchvision.models.resnet18().children())[:-2]), 3, (64, 64))
        ),
    }


@package("antialiased-cnns")
def _() -> dict[str, Entry]:
    import antialiased_cnns as aa

    names = ("resnet18", "resnext50_32x4d", "vgg11_bn", "mobilenet_v2", "densenet121", "alexnet")
    return {name: made(getattr(aa, name), on=(2, 3, 224, 224) if name == "alexnet" else IMAGE) for name in names}


@package("yolov5")
def _() -> dict[str, Entry]:
    import yolov5
    from yolov5.models.yolo import Model

    folder = importlib.resources.files(yolov5) / "models"
    return {name: made(Model, str(folder / f"{name}.yaml")) for name in ("yolov5n", "yolov5s")}


@package("geffnet")
def _() -> dict[str, Entry]:
    import geffnet

    names = (
        "mobilenetv3_large_100",
        "mobilenetv2_100",
        "efficientnet_b0",
        "efficientnet_es",
        "mnasnet_a1",
        "mixnet_s",
        "fbnetc_100",
    )
    return {name: made(geffnet.create_model, name, pretrained=False) for name in names}


@package("resnest")
def _() -> dict[str, Entry]:
    from resnest.torch import resnest50

    return {"resnest50": made(resnest50)}


@package("effdet")
def _() -> dict[str, Entry]:
    from effdet import EfficientDet, get_efficientdet_config

    config = get_efficientdet_config("tf_efficientdet_d0")
    config.image_size = (128, 128)
    return {"tf_efficientdet_d0": made(EfficientDet, config, pretrained_backbone=False, on=LARGE)}


@package("denoising-diffusion-pytorch")
def _() -> dict[str, Entry]:
    import denoising_diffusion_pytorch as ddp

    time = torch.tensor([3, 5])
    return {
        "Unet": made(ddp.Unet, 16, dim_mults=(1, 2), on=lambda: (numbers(2, 3, 32, 32), time)),
        "Unet1D": made(ddp.Unet1D, 16, dim_mults=(1, 2), channels=3, on=lambda: (numbers(2, 3, 64), time)),
    }


@package("craft-text-detector")
def _() -> dict[str, Entry]:
    from craft_text_detector.models.craftnet import CraftNet

    return {"CraftNet": made(CraftNet, pretrained=False)}


@package("compressai")
def _() -> dict[str, Entry]:
    from compressai import models

    return {
        "FactorizedPrior": made(models.FactorizedPrior, 8, 16),
        "ScaleHyperprior": made(models.ScaleHyperprior, 8, 16),
        "Cheng2020Anchor": made(models.Cheng2020Anchor, 8),
        "Cheng2020Attention": made(models.Cheng2020Attention, 8),
    }


@package("torchreid")
def _() -> dict[str, Entry]:
    import torchreid

    names = {
        "osnet_x0_25": (128, 64),
        "hacnn": (160, 64),
        "mlfn": (128, 64),
        "mudeep": (256, 128),
        "pcb_p6": (384, 128),
        "resnet50mid": (128, 64),
    }
    return {
        name: made(torchreid.models.build_model, name, 10, pretrained=False, on=(2, 3, *size))
        for name, size in names.items()
    }


@package("unet")
def _() -> dict[str, Entry]:
    import unet

    common = {"out_classes": 2, "num_encoding_blocks": 3, "out_channels_first_layer": 8, "padding": 1}
    return {
        "UNet2D": made(unet.UNet2D, **common, normalization="batch", on=(2, 1, 32, 32)),
        "UNet3D residual": made(unet.UNet3D, **common, residual=True, normalization="batch", on=SCAN),
    }


@package("python-doctr")
def _() -> dict[str, Entry]:
    from doctr import models

    text = (2, 3, 32, 128)
    names = (
        "vgg16_bn_r",
        "resnet18",
        "resnet31",
        "resnet34_wide",
        "magc_resnet31",
        "mobilenet_v3_small_r",
        "textnet_tiny",
        "starnet_tiny",
    )
    found = {
        name: made(getattr(models.classification, name), pretrained=False, on=text)
        for name in names
        if hasattr(models.classification, name)
    }
    return found | {
        "db_resnet50": made(models.detection.db_resnet50, pretrained=False, pretrained_backbone=False),
        "linknet_resnet18": made(models.detection.linknet_resnet18, pretrained=False, pretrained_backbone=False),
        "fast_tiny": made(models.detection.fast_tiny, pretrained=False, pretrained_backbone=False),
        "crnn_vgg16_bn": made(models.recognition.crnn_vgg16_bn, pretrained=False, pretrained_backbone=False, on=text),
    }
