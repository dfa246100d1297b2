// From questions to token ids and from token ids to text: the pieces of `chat.json` around pictures, questions and
// answers, as chat.py of the Python runner puts them together, and a tokenizer of @huggingface/tokenizers.

import { RunnerError } from "./folder.js";

const MOST_ASKED = 2 ** 18;
const MOST_TURNS = 2 ** 10;
// What Python calls white space.
const SPACE = "[\\t-\\r\\x1c- \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+";
const AROUND = new RegExp(`^${SPACE}|${SPACE}$`, "g");

export function stripped(text) {
  return text.replace(AROUND, "");
}

export class Chat {
  // pieces: chat.json; rules: tokenizer.json; imageToken: the id that stands for a picture.
  constructor(pieces, rules, Tokenizer, imageToken, where) {
    this.pieces = pieces;
    try {
      this.tokenizer = new Tokenizer(rules, { clean_up_tokenization_spaces: false, unk_token: rules.model.unk_token });
    } catch (error) {
      const advice = "use the Python runner: @huggingface/tokenizers does not read this tokenizer";
      throw new RunnerError(`the tokenizer cannot be read: ${error.message}`, where, advice, { cause: error });
    }
    const found = this.ids(pieces.placeholder, false);
    if (found.length !== 1 || found[0] !== imageToken) {
      throw new RunnerError(`${pieces.placeholder} is not the token ${imageToken}`, where, "export the model again");
    }
  }

  // The token ids of a chat. turns: {tokens: visual tokens of each picture, question, answer}, the last one unanswered.
  prompt(turns) {
    if (turns.length > MOST_TURNS)
      throw new RunnerError(`a chat of ${turns.length} turns`, "history", "leave out old ones");
    const { placeholder, first, later, answer, end, special } = this.pieces;
    let text = "";
    turns.forEach((turn, number) => {
      const ask = number ? later : first;
      const images = turn.tokens.map((count) => ask.image.split(placeholder).join(placeholder.repeat(count)));
      text += ask.open + images.join("") + ask.text + this.plain(turn.question);
      if (number + 1 < turns.length) text += answer + this.plain(turn.answer);
    });
    return this.ids(text + end, special);
  }

  // A user's text, refused if it would be read as tokens of the model.
  plain(text) {
    if (typeof text !== "string" || text.length > MOST_ASKED) {
      const what = "a question or an answer is not text, or too long";
      throw new RunnerError(what, "question", `give at most ${MOST_ASKED} characters`);
    }
    const { control, reserved, strip } = this.pieces;
    const token = this.ids(text, false).find((id) => control.includes(id));
    const inside =
      reserved.find((name) => text.includes(name)) ?? (token === undefined ? token : this.tokenizer.id_to_token(token));
    if (inside !== undefined) {
      const what = `the text holds '${inside}', which is a token of the model and not text: ${text.slice(0, 200)}`;
      throw new RunnerError(what, "question", "write it in another way: with spaces in it, or in words");
    }
    return strip ? stripped(text) : text;
  }

  ids(text, special) {
    const ids = text ? this.tokenizer.encode(text, { add_special_tokens: special }).ids : [];
    if (!ids.every(Number.isInteger)) {
      throw new RunnerError(`the text has no tokens: ${text.slice(0, 200)}`, "question", "write it in other words");
    }
    return ids;
  }

  // The text of an answer, special tokens left out.
  text(ids) {
    return ids.length ? this.tokenizer.decode(ids, { skip_special_tokens: true }) : "";
  }
}

// The text of an answer as its tokens come: whole characters only. A token's text depends on those before it, so it is
// what the last tokens together say more than they said without it.
export class Spelling {
  constructor(chat) {
    this.chat = chat;
    this.seen = [];
    this.start = 0;
    this.told = 0;
  }

  // What can be said after one more token.
  add(token) {
    this.seen.push(token);
    const more = this.rest();
    if (!more || more.endsWith("\ufffd")) return "";
    this.start = this.told;
    this.told = this.seen.length;
    return more;
  }

  // What has not been said yet.
  rest() {
    const before = this.chat.text(this.seen.slice(this.start, this.told));
    const now = this.chat.text(this.seen.slice(this.start));
    return now.startsWith(before) ? now.slice(before.length) : "";
  }
}
