"""A model of Triton's Python backend that stands for a plan: it runs the ONNX file beside it."""

from pathlib import Path

import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(folder / "unet.onnx", options)

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        names = [node.name for node in self.session.get_inputs()]
        given = {name: pb_utils.get_input_tensor_by_name(request, name) for name in names}
        (predicted,) = self.session.run(None, {name: t.as_numpy() for name, t in given.items()})
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("prediction", predicted)])
