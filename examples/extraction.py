"""Extraction into pydantic models. The metric is an LM that judges whether the order says what the mail says.

There is no expected output in the trainset. The judge answers two short questions about the mail, and the order must
agree with its answers; https://arxiv.org/abs/2004.04228 judges summaries so. A small model can do that. Asked whether
an order is right, SmolLM2 says yes to every order. The judge is a DSPy program of its own, its calls are counted, and
OPRO does not rewrite it. DSPy's cache has its answers from the second candidate on. `Metric(lm)` gives the judge
another LM.

Known answers for the mails measure the judge: how often it is right about an order. Run
`python examples/extraction.py --help`.
"""

from __future__ import annotations

from typing import Any

import dspy
from flags import parse
from pydantic import BaseModel

from dspy_opro import OPROTeleprompter


class Order(BaseModel):
    quantity: int
    city: str


MAILS = [
    ("Please send 3 lamps to Lund.", Order(quantity=3, city="Lund")),
    ("We need 12 chairs at our office in Graz, thank you!", Order(quantity=12, city="Graz")),
    ("One desk to Porto, please.", Order(quantity=1, city="Porto")),
    ("Last time I had 2 clocks. Now make it 5, to Bern again.", Order(quantity=5, city="Bern")),
    ("Could 7 shelves be in Riga by Monday?", Order(quantity=7, city="Riga")),
    ("I live in Ghent and would like 4 mirrors.", Order(quantity=4, city="Ghent")),
    ("Two dozen pens for the school in Turku.", Order(quantity=24, city="Turku")),
    ("Not 6 but 8 stools, please, delivered to Nantes.", Order(quantity=8, city="Nantes")),
    ("My sister in Cork wants a rug. I pay.", Order(quantity=1, city="Cork")),
    ("10 vases, from your shop in Rome to mine in Pisa.", Order(quantity=10, city="Pisa")),
    ("Send 15 plates and no cups to Split.", Order(quantity=15, city="Split")),
    ("A pair of curtains for Leeds.", Order(quantity=2, city="Leeds")),
]


class HowMany(dspy.Signature):
    """How many of it does the writer order?"""

    mail: str = dspy.InputField()
    quantity: int = dspy.OutputField()


class WhereTo(dspy.Signature):
    """Which city does the order go to?"""

    mail: str = dspy.InputField()
    city: str = dspy.OutputField()


class Metric:
    """Scores an order by what the judge reads in the mail. What differs goes into the meta-prompt as feedback."""

    def __init__(self, lm: Any = None) -> None:
        self.questions = {
            "quantity": dspy.Predict(HowMany),
            "city": dspy.Predict(WhereTo),
        }
        for question in self.questions.values():
            question.lm = lm

    def __call__(
        self, example: dspy.Example, prediction: dspy.Prediction, trace: Any = None
    ) -> dict[str, Any]:
        order, problems = prediction.order, []
        read = {name: question(mail=example.mail)[name] for name, question in self.questions.items()}
        agrees = {
            "quantity": order.quantity == read["quantity"],
            "city": order.city.lower() == read["city"].lower(),
        }
        for name, is_same in agrees.items():
            if not is_same:
                problems.append(
                    f"{name} is {getattr(order, name)!r}, but the mail seems to say {read[name]!r}."
                )
        return {"score": sum(agrees.values()) / len(agrees), "feedback": " ".join(problems)}


class Extract(dspy.Signature):
    """Extract the order."""

    mail: str = dspy.InputField()
    order: Order = dspy.OutputField()


def main() -> None:
    flags = parse(__doc__, max_metric_calls=60, max_tokens=32)
    metric = Metric()
    trainset = [dspy.Example(mail=mail).with_inputs("mail") for mail, _ in MAILS]
    teleprompter = OPROTeleprompter(
        metric=metric,
        proposer=flags.proposer,
        max_metric_calls=flags.max_metric_calls,
        num_threads=flags.num_threads,
        seed=flags.seed,
    )
    student = dspy.Predict(Extract)
    program = teleprompter.compile(student, trainset=trainset)
    print(program.opro_result.summary())
    print(f"instruction: {program.signature.instructions!r}")
    for name, module in (("before", student), ("after", program)):
        predictions = [module(mail=mail) for mail, _ in MAILS]
        right = [p.order == known for p, (_, known) in zip(predictions, MAILS, strict=True)]
        said = [metric(e, p)["score"] == 1 for e, p in zip(trainset, predictions, strict=True)]
        agreed = sum(a == b for a, b in zip(right, said, strict=True))
        print(f"{name}: {sum(right)} of {len(MAILS)} right, the judge is right about {agreed}")


if __name__ == "__main__":
    main()
