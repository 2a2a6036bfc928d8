"""Autograd nodes whose third derivative has been compared with finite differences in float64.

Written by tests/helpers/write_verified.py with torch 2.13; docs/verified-ops.md says for which operations.
"""

TORCH = "2.13"

_NODES = """
Abs Acos Acosh AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D Add Addbmm Addcdiv Addcmul Addmm Addmv
Addr AffineGridGenerator Alias Amax Amin Aminmax Angle AsStrided Asin Asinh Atan Atan2 Atanh AvgPool2D AvgPool3D
BackwardHookFunction Baddbmm BinaryCrossEntropy BinaryCrossEntropyWithLogits Bmm Cat Ceil Celu ChannelShuffle Clamp ClampMin
Clone Col2Im ConstantPadNd ConvTbc Convolution Copysign Cos Cosh Cummax Cummin Cumprod Cumsum Deg2Rad DiagEmbed Diagonal Digamma
Dist Div Dot Elu Embedding Erf Erfc Erfinv EuclideanDist Exp Exp2 Expand Expm1 FftC2C FftC2R FftR2C Flip Floor Fmax Fmin Fmod
FractionalMaxPool2D FractionalMaxPool3D Gather Gelu Glu GridSampler2D GridSampler3D GroupedMm Hardshrink Hardswish Hardtanh
HuberLoss Hypot I0 Igamma Igammac Im2Col Index IndexAdd IndexCopy IndexFill IndexPut IndexReduce IndexSelect Kthvalue Ldexp
LeakyRelu Lerp Lgamma LinalgCholeskyEx LinalgCross LinalgDet LinalgEig LinalgEigh LinalgHouseholderProduct LinalgInvEx
LinalgLstsq LinalgLu LinalgMatrixExp LinalgPinv LinalgQr LinalgSlogdet LinalgSolveEx LinalgSolveTriangular LinalgSvd
LinalgVectorNorm Log Log10 Log1P Log2 LogSigmoid LogSoftmax Logaddexp Logaddexp2 Logit Logsumexp MaskedFill MaskedScatter
MaskedSelect Max MaxPool2DWithIndices MaxPool3DWithIndices MaxUnpool2D MaxUnpool3D Maximum Mean Median Min Minimum Mish
MkldnnRnnLayer Mm MseLoss Mul Mv Mvlgamma NanToNum Nansum NativeBatchNorm NativeDropout Neg NllLoss NllLoss2D Norm
PackPaddedSequence Permute PixelShuffle PixelUnshuffle Polygamma Pow PreluKernel Prod Rad2Deg Reciprocal ReflectionPad1D
ReflectionPad2D ReflectionPad3D Relu Remainder Renorm Repeat ReplicationPad1D ReplicationPad2D ReplicationPad3D ReshapeAlias
Roll Rot90 Round RreluWithNoise Rsqrt Rsub SafeSoftmax Scatter ScatterAdd ScatterReduce Select Sigmoid Sign Silu Sin Sinc Sinh
Slice SmoothL1Loss SoftMarginLoss Softmax Softplus Softshrink Sort SparseAddmm SpecialEntr SpecialErfcx SpecialI0E SpecialI1
SpecialI1E SpecialLogNdtr SpecialNdtri SpecialXlog1Py SpecialZeta Split SplitWithSizes Sqrt Squeeze Stack Std StdMean Sub Sum T
Take Tan Tanh Threshold ToCopy Topk Trace Transpose Tril Trilinear Triu Unbind Unfold UnsafeSplit UnsafeView Unsqueeze
UpsampleBicubic2D UpsampleBicubic2DAa UpsampleBilinear2D UpsampleBilinear2DAa UpsampleLinear1D UpsampleNearest1D
UpsampleNearest2D UpsampleNearest3D UpsampleNearestExact1D UpsampleNearestExact2D UpsampleNearestExact3D UpsampleTrilinear3D Var
VarMean View ViewAsComplex ViewAsReal Where Xlogy
"""
VERIFIED: frozenset[str] = frozenset(f"{name}Backward" for name in _NODES.split()) | {
    "DiagonalBackward0_copy",
    "torch::autograd::CopySlices",
}
