"""Networks for other runtimes: ``torch.export`` programs and ONNX files, compared with eager."""
