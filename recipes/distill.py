r"""
Distills any student `CLIPModel`, mapped or not, from its teacher: the retraining stage alone.

    python recipes/distill.py --student_model mapped --teacher openai/clip-vit-base-patch16 \
        --train_data pairs.parquet --output_dir distilled

With `--teacher_cache DIR`, the teachers' embeddings are computed first (or by recipes/cache.py), and then only read.
With `--labels queries.txt`, only the vision tower is trained and written, for the texts of that list.
"""

from dataclasses import dataclass, field

from clipmap_hf.cli.arguments import TeacherArguments
from clipmap_hf.cli.parsing import arguments_yaml
from clipmap_hf.cli.recipes import parse_recipe
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.data.labels import LabelArguments
from clipmap_hf.teacher_cache.arguments import TeacherCacheArguments
from clipmap_hf.training.arguments import DistillationStageArguments
from clipmap_hf.training.run_arguments import RunArguments


@dataclass
class StudentModelArguments:
    student_model: str = field(metadata={"help": "Hub id or folder of the CLIPModel to train."})
    student_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub student."})


def main() -> None:
    data, teacher, cache, student, run, labels, distillation = parse_recipe(
        DataArguments,
        TeacherArguments,
        TeacherCacheArguments,
        StudentModelArguments,
        RunArguments,
        LabelArguments,
        stages={"distillation": DistillationStageArguments},
        description=__doc__,
    )
    from clipmap_hf.cli.summary import print_summary
    from clipmap_hf.distributed import join_processes
    from clipmap_hf.models.loading import load_model, load_processor
    from clipmap_hf.pipeline.context import RunContext
    from clipmap_hf.pipeline.distillation import DistillationTrainer
    from clipmap_hf.pipeline.labels import LabelTrainer, arguments_for_labels

    join_processes()
    has_labels = labels.labels is not None
    distillation = arguments_for_labels(distillation) if has_labels else distillation
    recipe = arguments_yaml(data, teacher, cache, student, run, labels, distillation=distillation)
    source = {"revision": student.student_revision}
    trainer = (LabelTrainer if has_labels else DistillationTrainer)(
        load_model(student.student_model, **source),
        teacher.teachers,
        distillation,
        processing_class=load_processor(student.student_model, backend=data.image_backend, **source),
        context=RunContext(run, data, recipe, cache, labels=labels.loaded),
    )
    print_summary(run.output_dir, trainer.train())


if __name__ == "__main__":
    main()
