"""The rule of ``update_rule.py`` applied in place to lists of tensors; each path is held to it by a test.

single_tensor   one tensor after another, by the rule itself: any layout, dtype, tensor lr, differentiable
foreach         few passes over lists of dense tensors of one dtype: the default where it applies
"""
