"""`sophia doctor`: is this installation whole, and does Sophia find what it needs in your model?

It needs torch alone, so it also runs where the lab cannot.

findings       what a check says
installation   versions, other packages of the same name, files that are not those installed
machine        device, threads, the paths of the step and how the compiled one got there
given_model    a model and its loss, the user's or a small one of our own
trial_steps    twenty steps beside AdamW
what_is_proved what a refresh has found in the model, proved and assumed
command        the command line
"""
