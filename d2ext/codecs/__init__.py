"""Annotation → training target (encode) and prediction → result (decode); functions of tensors."""
