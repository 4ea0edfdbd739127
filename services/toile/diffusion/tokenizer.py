"""The tiny base's own vocabulary: a small byte-level BPE in CLIP's file format."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from toile.imaging.colours import NAMED_COLOURS
from toile.imaging.renderer.vocabulary import CATEGORIES, MATERIALS, PART_NAMES, PATTERN_SYNONYMS

START = "<|startoftext|>"
END = "<|endoftext|>"
MAX_TOKENS = 77
VOCABULARY_SIZE = 1600

# CLIP's own splitting rule; training must cut words exactly as the tokenizer will.
_SPLIT = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)

_WORDS = """
a an and are as at back background backdrop below border bright by button buttons centre close
clothes clothing collar collared collars colour coloured colours cuffs dark delicate design detail
detailed draped dress dresses edge edges elegant embroidered embroidery evening eyelet fabric
fabrics fashion fine fit fitted flat flared flower flowers folded folds for from front full
garment garments ground hat hats hem her high his hem image in is it jacket jackets jeans jersey
large laid lay layered lace lapels leaf leaves leg legs light lining long longsleeve loose low
made make mannequin material maxi midi mini mesh model motif motifs neck neckline net of on one
open outwear over pair pale panel pants pattern patterned photo photograph picture plain pleated
pleats pocket pockets printed product puff quality regular repeat round rose roses sample
scalloped seam shade sheer shirt shirts shoes short shorts side silk simple size skirt skirts
sleeve sleeved sleeveless sleeves slim small soft square stand style summer swatch swatches t tee
textile textiles texture the thin this thread tie to top trim tulip two v vintage waist waistband
wearing weave white wide with without winter woman women wool woven yoke zip zipper change turn
colour into more less add remove replace keep photo of sky lilac ivory cream burgundy maroon gold
golden silver mint sage olive khaki coral turquoise violet rust dusty dark light pastel deep vivid
pale daisy vine paisley fan leaf blossom bouquet garland wreath petal petals crochet guipure tulle
chantilly bobbin chenille velvet linen leather corduroy suede wool cashmere twill cotton denim
satin knit ribbed brim crown cap beret bucket wide-brim straight skinny bell pencil circle a-line
bodice straps strap shoulder shoulders bomber blazer coat hood button-up polo crew cuff cuffs
stripe stripes dot dots check checks chevron tartan gingham polka floral flowered solid striped
dotted checked plaid zigzag blurry bad low quality worst cropped text watermark
"""


def training_words() -> list[str]:
    """Every word of the renderer's captions, and some a designer would add, each once."""
    vocabulary: list[str] = [*NAMED_COLOURS, *CATEGORIES, *MATERIALS, *PART_NAMES]
    for synonyms in PATTERN_SYNONYMS.values():
        vocabulary.extend(word for synonym in synonyms for word in synonym.split())
    return list(dict.fromkeys([*vocabulary, *_WORDS.split()]))


def write_tokenizer(folder: Path) -> None:
    """Train the vocabulary and write it as a `CLIPTokenizer` folder; deterministic."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = _learn_merges()
    letters = _byte_letters()
    vocabulary = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *("".join(merge) for merge in merges),
    ]
    vocabulary = [*dict.fromkeys(vocabulary), START, END]
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    vocab_file.write_text(
        json.dumps({token: index for index, token in enumerate(vocabulary)}), encoding="utf-8"
    )
    merges_file.write_text(
        "\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges), ""]), encoding="utf-8"
    )
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=merges,
        model_max_length=MAX_TOKENS,
    )
    tokenizer.save_pretrained(folder)


def _byte_letters() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _learn_merges() -> list[tuple[str, str]]:
    trainee = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainee.normalizer = normalizers.Lowercase()
    trainee.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainee.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        min_frequency=1,
        initial_alphabet=_byte_letters(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trainee.train_from_iterator(training_words(), trainer)
    merges = json.loads(trainee.to_str())["model"]["merges"]
    return [(first, second) for first, second in merges]
