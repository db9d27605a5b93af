"""Generated answers do not depend on who shares the batch."""

from echolora_kernels.integrations.transformers import load_model
from echolora_kernels.training.data import read_llm_adapters
from echolora_kernels.training.evaluate import exact_match


def test_answers_in_a_padded_batch_are_those_of_one_question_alone(model_folder, data_file):
    model, tokenizer = load_model(str(model_folder))
    questions = read_llm_adapters(data_file)[:12]
    done = []
    together = exact_match(model.train(), tokenizer, questions, batch_size=5, max_new_tokens=6, on_batch=done.append)
    alone = exact_match(model, tokenizer, questions, batch_size=1, max_new_tokens=6)
    assert together == alone
    assert len(set(together[1])) > 1
    assert done == [5, 10, 12]
    assert model.training
