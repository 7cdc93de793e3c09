"""One module a library, run by the interpreter that has it. Each has

- ``VARIANTS``: name -> ``open(folder, batch)``, which returns ``epoch(number) -> iterator`` over that epoch's batches,
  each a pair of int64 tensors ``tokens`` and ``labels`` [batch, SEQ_LEN] on the calling thread;
- ``write(rows, folder)``: the same sequences (uint16 [n, SEQ_LEN + 1]) in the library's own format;
- ``VERSION``: of the library;
- ``SKIP``: batches at the start of an epoch that are not timed: 1 where the first one waits for a plan of the whole
  epoch, which a long epoch would make up for; 0 where it fills a shuffle buffer, which would hide reading.
"""
