"""Every place where kt_sft changes a library above it, or is called by one.

Outside this package kt_sft.loading only reads upstream names: its quantizer is a subclass of transformers' HfQuantizer,
and its mapping looks at the conversions in transformers.core_model_loading. What both rely on is checked, name by name,
in tests/unit/test_integrations_seams.py.
"""
