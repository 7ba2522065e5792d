"""A detector behind HTTP: a page that shows what it finds, and answers in JSON for programs.

It stands on inference, and imports that and what is below it; nothing but its command imports it. Starlette, uvicorn and
python-multipart, the extra `serve`, are imported here alone.
"""
