"""A page in the browser: create images of subjects, look into their files, train one. `coeff-diffusers app` opens it.

settings.py    what there is to choose
pipeline.py    the base model that all visitors share
visitors.py    what each of them has brought or trained, which no other sees
runs.py        training, one run at a time
create.py, inspect_file.py, train.py    a tab each: plain functions first, then what is on the page
page.py        the tabs together; messages.py has errors shown as messages
run.py         starts and ends it
"""
