#!/usr/bin/env bash
# Package:   gpytorch 1.15.2 (linear-operator 0.6.1) on torch 2.13.0, CPU.
# Behaviour: the second derivative of the marginal log-likelihood in the lengthscale, taken by autograd with
#            create_graph=True, is wrong for RBFKernel and MaternKernel: of another sign, below. The first one is
#            right. Their covariance is an autograd function whose backward keeps its derivative as a plain
#            tensor, so that a second backward takes it for a constant; it is not marked as once differentiable,
#            and nothing is said. Under gpytorch.settings.trace_mode() the kernels run plain operations, and
#            the derivative agrees with the difference of two first ones.
# Why it matters: Laplace approximations, Newton steps, standard errors of hyperparameters, and estimators of
#            curvature are made of this number.
# Source:    found by comparing autograd with differences; the documentation of trace_mode and of the kernels
#            says nothing of second derivatives.
# Exit code: 0 while it behaves so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5" "gpytorch==1.15.2" "linear-operator==0.6.1"
cat > "$folder/case.py" <<'PYTHON'
import sys

import gpytorch
import torch

torch.manual_seed(0)
X = torch.linspace(0, 1, 60, dtype=torch.float64)
Y = torch.sin(6 * X) + 0.1 * torch.randn(60, dtype=torch.float64)


class Process(gpytorch.models.ExactGP):
    def __init__(self, likelihood, kernel):
        super().__init__(X, Y, likelihood)
        self.mean, self.kernel = gpytorch.means.ZeroMean(), kernel

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))


def second(kernel, plain):
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    model = Process(likelihood, kernel).double().train()
    model.kernel.lengthscale, likelihood.noise = 0.2, 0.05
    mll, scale = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model), model.kernel.raw_lengthscale

    def slope():
        return torch.autograd.grad(-mll(model(X), Y), scale, create_graph=True)[0].sum()

    with gpytorch.settings.trace_mode(plain):
        by_autograd = float(torch.autograd.grad(slope(), scale)[0])
        slopes = []
        for step in (1e-3, -2e-3):
            scale.data += step
            slopes.append(float(slope().detach()))
    return by_autograd, (slopes[0] - slopes[1]) / 2e-3


wrong = True
print(f"gpytorch {gpytorch.__version__}, torch {torch.__version__}: second derivative in the raw lengthscale")
for make in (gpytorch.kernels.RBFKernel, gpytorch.kernels.MaternKernel):
    (usual, truth), (plain, same) = second(make(), False), second(make(), True)
    print(f"{make.__name__}: by autograd {usual:.4f}, under trace_mode {plain:.4f}, by differences {truth:.4f}")
    wrong &= abs(usual - truth) > 0.1 and abs(plain - same) < 1e-3
sys.exit(0 if wrong else 1)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/case.py"
