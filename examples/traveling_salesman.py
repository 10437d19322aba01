"""The paper's section 3.2: a language model as the optimizer of a tour through all towns.

A candidate is a tour, the text "0 3 1 2". The program answers with that tour and calls no LM, and the metric gives
minus the tour's length. The trainset has one example, the map. The optimizer LM sees tours with their scores in
ascending order, as in the paper's Figure 20, and writes new ones. The proposer makes a tour of every text.

What it shows: a strong model shortens tours of about ten towns. The more towns there are, the rarer is the optimum, and
a heuristic is better (the paper's section 3.2). A small model writes no tours: SmolLM2 repeats and leaves out towns.
What is right about its texts is luck, and the search keeps it. Run `python examples/traveling_salesman.py --help`.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from typing import Any

import dspy
from flags import parse

from dspy_opro import OPROTeleprompter, ProposalRequest

NUM_TOWNS = 8
Town = tuple[int, int]


def length(tour: list[int], towns: list[Town]) -> float:
    return sum(math.dist(towns[a], towns[b]) for a, b in zip(tour, tour[1:] + tour[:1], strict=True))


def shortest(towns: list[Town]) -> float:
    """By trying every tour: 5,040 for eight towns."""
    return min(length([0, *rest], towns) for rest in itertools.permutations(range(1, len(towns))))


class Salesman(dspy.Module):
    """Answers with the tour in its own instructions."""

    def __init__(self, tour: list[int]) -> None:
        super().__init__()
        self.tour = dspy.Predict(dspy.Signature("towns: list -> tour: list[int]", " ".join(map(str, tour))))

    def forward(self, towns: list[Town]) -> dspy.Prediction:
        tour = [int(number) for number in re.findall(r"\d+", self.tour.signature.instructions)]
        if sorted(tour) != list(range(len(towns))):
            raise ValueError(f"A tour visits each of the {len(towns)} towns once.")
        return dspy.Prediction(tour=tour)


def minus_length(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> float:
    return -length(prediction.tour, example.towns)


def from_town(tour: list[int], town: int) -> list[int]:
    """The same tour, written from another town on."""
    start = tour.index(town)
    return tour[start:] + tour[:start]


class NextTour(dspy.Module):
    """Asks the LM to continue the list of scored tours.

    A tour is the same from whatever town it is written. So every request writes all of them from another town, and the
    LM does not see the same list twice. Its text is repaired: a town counts once, and missing towns follow in the order
    of the best tour.
    """

    def __init__(self, towns: list[Town], **options: Any) -> None:
        super().__init__()
        self.towns = towns
        self.options = options
        """Parameters of the LM."""

    def forward(self, request: ProposalRequest) -> dspy.Prediction:
        first = random.Random(request.seed).randrange(len(self.towns))
        scored = [
            (list(map(int, t.split())), s) for t, s in request.scored_instructions["tour"] if s is not None
        ]
        tours = [f"score {s}: {' '.join(map(str, from_town(tour, first)))}" for tour, s in scored]
        places = ", ".join(f"({number}): {town}" for number, town in enumerate(self.towns))
        prompt = (
            f"You have towns with coordinates: {places}. Below are tours with their scores from 0 to 100, in ascending "
            "order. A shorter tour has a higher score. Write a new tour with a higher score, in the same form. It "
            "visits every town once.\n\n" + "\n".join([*tours, f"score 100: {first}"])
        )
        (answer,) = dspy.settings.lm.copy(**self.options)(prompt)
        text = answer if isinstance(answer, str) else answer["text"]
        numbers = [int(number) for number in re.findall(r"\d+", text.rpartition(":")[2])]
        known = [town for town in numbers if town < len(self.towns)]
        best = from_town(scored[-1][0], first) if scored else list(range(len(self.towns)))
        tour = list(dict.fromkeys([first, *known, *best]))
        tour = from_town(tour, 0)
        tour = tour if tour[1] < tour[-1] else [0, *tour[:0:-1]]  # the same in the other direction
        return dspy.Prediction(instruction=" ".join(map(str, tour)))


def main() -> None:
    flags = parse(__doc__, max_metric_calls=200)
    generator = random.Random(flags.seed)
    towns = [(generator.randint(-100, 100), generator.randint(-100, 100)) for _ in range(NUM_TOWNS)]
    start = Salesman(generator.sample(range(NUM_TOWNS), NUM_TOWNS))
    teleprompter = OPROTeleprompter(
        metric=minus_length,
        proposer=NextTour(towns, **flags.one_line(max_tokens=24)),
        num_rounds=8,
        lag=0,  # every proposal sees all earlier scores, as in the paper
        max_metric_calls=flags.max_metric_calls,
        num_threads=flags.num_threads,
        confirm=False,  # there is one map
        seed=flags.seed,
    )
    program = teleprompter.compile(start, trainset=[dspy.Example(towns=towns).with_inputs("towns")])
    result = program.opro_result
    print(result.summary())
    print(
        f"start {-result.baseline.reward:.0f}, found {-result.best.reward:.0f}, shortest {shortest(towns):.0f}"
    )
    print(f"tour: {program.tour.signature.instructions}")
    print(f"{len(result.trajectory) - 1} new tours in {result.usage.proposer_calls} proposals")


if __name__ == "__main__":
    main()
