"""The backend in Triton for NVIDIA GPUs of compute capability 8.0 and newer; see `backend.py`."""
