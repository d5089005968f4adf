"""nformer-edge: person re-identification with NFormer, from training to a proven engine.

Importing this package loads neither torch nor onnxruntime nor tensorrt: a device needs its runtime alone.
"""

__version__ = "0.1.0"
