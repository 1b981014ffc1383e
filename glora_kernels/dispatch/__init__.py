"""How a call of an operator runs. The example is `glora_linear`.

    glora.op.glora_linear   puts its tensors in a row: a tuple in the order of the operator's `Signature`
    Operator.call           picks the way into the operator (`ways`); this is the way of plain eager mode
    prepared.find           looks up the class of the call: dtypes, shapes, strides, device, class of M, values
      first of its class:   Operator.prepare checks it and says what backward needs. runtime.program.find then runs
                            glora.triton.forward once on meta tensors, where Launch.run() records and launches nothing
      later:                a dictionary look-up
    prepared.Applied        the one autograd.Function of all operators
    runtime.program.Program allocates the results and replays the recorded launches through csrc's direct.c

So the code to read is glora/triton.py and its kernels; it runs once per class of calls. GLORA_KERNELS_LAUNCH=slow runs
it at every call, which is what a debugger needs. On a CPU the same row goes to glora/eager.py.
"""
