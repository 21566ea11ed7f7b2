"""What a pre-training run takes in hours and money, with AdamW and with Sophia at a given speed-up.

    FLOPs of AdamW    = FLOPs of a token * tokens
    seconds           = FLOPs / (devices * peak * utilisation), or steps * measured seconds of a step
    money             = seconds * devices * price of a device and second
    of the contender  = of AdamW * (1 + its overhead) / its speed-up in steps

So a contender pays if its speed-up in steps is above 1 + overhead. Every input carries where it is from.
``inputs`` holds them, ``asked`` is what may be given, ``finding`` goes from there to inputs, by way of
recipes and examples, ``measured`` reads a speed-up from a comparison, ``bill`` calculates.
"""
