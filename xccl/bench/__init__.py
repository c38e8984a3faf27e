"""`xccl bench`: times of operations, checked, with floors and MPI beside them. Built as nccl-tests are.

An operation is a record in a file of `operations`; the runner knows nothing of it.
"""
