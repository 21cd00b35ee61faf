"""Ready stores: folders whose experts are codes and scales as the engine reads them, made once by `kt-sft quantize`."""
