// The files of an exported folder, on disk or behind a URL: each one is compared with the manifest before it is used.

const MANIFEST = "manifest.json";
const WEIGHTS = "weights.data";
const FORMAT = "qpcompile-onnx";
const VERSION = 1;
const NEW_FOLDER = "get the folder again from where it was exported, or export the model again";

// What is wrong, where, and what to do: the one error of this module.
export class RunnerError extends Error {
  constructor(what, where, advice, options) {
    super(`${what}\n  where: ${where}\n  what to do: ${advice}`, options);
    this.name = "RunnerError";
    this.what = what;
    this.where = where;
    this.advice = advice;
  }
}

// `value`, if it is a whole number in a range.
export function whole(value, name, least, most, where = name) {
  if (!Number.isSafeInteger(value) || value < least || value > most) {
    throw new RunnerError(
      `${name} is ${String(value).slice(0, 100)}`,
      where,
      `give a whole number from ${least} to ${most}`,
    );
  }
  return value;
}

export class Folder {
  // place: a path (node), or a URL; check: compare sizes and SHA-256 hashes with the manifest.
  static async open(place, check) {
    const folder = new Folder();
    folder.name = String(place).replace(/\/+$/, "");
    folder.onDisk = typeof process !== "undefined" && !!process.versions?.node && !/^https?:/.test(folder.name);
    if (folder.onDisk && folder.name.startsWith("file:")) {
      folder.name = (await import("node:url")).fileURLToPath(folder.name);
    }
    folder.check = check;
    if (check && !folder.onDisk && !globalThis.crypto?.subtle) {
      const advice = "serve the folder by https or from localhost, or pass check: false";
      throw new RunnerError(
        "files cannot be compared with their hashes: the page came by plain http",
        folder.name,
        advice,
      );
    }
    const manifest = parsed(await folder.read(MANIFEST), folder.where(MANIFEST));
    if (manifest.format !== FORMAT || manifest.version !== VERSION) {
      const found = `${manifest.format}, version ${manifest.version}`.slice(0, 100);
      throw new RunnerError(`this is not an exported folder: format ${found}`, folder.where(MANIFEST), NEW_FOLDER);
    }
    folder.files = manifest.files;
    return folder;
  }

  has(name) {
    return Object.hasOwn(this.files, name);
  }

  where(name) {
    return `${this.name}/${name}`;
  }

  async json(name) {
    return parsed(await this.bytes(name), this.where(name));
  }

  // The content of a listed file.
  async bytes(name) {
    this.entry(name);
    const content = await this.read(name);
    if (this.check) {
      const hash = await crypto.subtle.digest("SHA-256", content);
      this.compare(name, content.length, hex(new Uint8Array(hash)));
    }
    return content;
  }

  // Compare a file on disk that onnxruntime reads itself.
  async checked(name) {
    this.entry(name);
    if (!this.check) return;
    const [{ createHash }, { createReadStream }] = await Promise.all([import("node:crypto"), import("node:fs")]);
    const hash = createHash("sha256");
    let size = 0;
    try {
      for await (const part of createReadStream(this.where(name))) {
        hash.update(part);
        size += part.length;
      }
    } catch (error) {
      throw new RunnerError(`the file cannot be read: ${error.message}`, this.where(name), NEW_FOLDER, {
        cause: error,
      });
    }
    this.compare(name, size, hash.digest("hex"));
  }

  entry(name) {
    if (!this.has(name)) throw new RunnerError(`${MANIFEST} does not list ${name}`, this.name, NEW_FOLDER);
    return this.files[name];
  }

  compare(name, size, hash) {
    const listed = this.entry(name);
    const differs = size !== listed.bytes ? "size" : hash !== listed.sha256 ? "hash" : "";
    if (differs) {
      const what = `the file is not the one that was exported: its ${differs} differs`;
      throw new RunnerError(what, this.where(name), NEW_FOLDER);
    }
  }

  async read(name) {
    try {
      if (this.onDisk) return new Uint8Array(await (await import("node:fs/promises")).readFile(this.where(name)));
      const answer = await fetch(this.where(name));
      if (!answer.ok) throw new Error(`HTTP status ${answer.status}`);
      return new Uint8Array(await answer.arrayBuffer());
    } catch (error) {
      throw new RunnerError(`the file cannot be read: ${error.message}`, this.where(name), NEW_FOLDER, {
        cause: error,
      });
    }
  }

  // onnxruntime's sessions for the graphs of these names. The native runtime reads weights from disk, so that large
  // ones are mapped; WebAssembly is given the bytes.
  async sessions(ort, names, threads) {
    const native = ort.env?.versions?.node !== undefined;
    if (native && !this.onDisk) {
      throw new RunnerError("onnxruntime-node opens folders on disk only", this.name, "pass onnxruntime-web as ort");
    }
    const weights = native ? await this.checked(WEIGHTS) : await this.bytes(WEIGHTS);
    const made = [];
    for (const name of names) {
      const file = `${name}.onnx`;
      const options = {
        logSeverityLevel: 4,
        enableMemPattern: false,
        ...(threads ? { intraOpNumThreads: threads } : {}),
      };
      // Products with 4-bit weights stay float products: onnxruntime would quantize activations to 8 bits.
      options.extra = { session: { qdq_matmulnbits_accuracy_level: "0" } };
      try {
        if (native) {
          await this.checked(file);
          made.push(await ort.InferenceSession.create(this.where(file), options));
        } else {
          const externalData = [{ path: WEIGHTS, data: weights }];
          const given = { ...options, externalData, executionProviders: ["wasm"] };
          made.push(await ort.InferenceSession.create(await this.bytes(file), given));
        }
      } catch (error) {
        if (error instanceof RunnerError) throw error;
        const advice = "use onnxruntime 1.30 or newer; check.json says which runtimes the folder was checked for";
        const what = `onnxruntime refuses the graph: ${String(error?.message ?? error).slice(0, 300)}`;
        throw new RunnerError(what, this.where(file), advice, { cause: error });
      }
    }
    return made;
  }
}

function parsed(bytes, where) {
  let content;
  try {
    content = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch (error) {
    throw new RunnerError(`the file cannot be read: ${error.message}`, where, NEW_FOLDER, { cause: error });
  }
  if (content === null || typeof content !== "object" || Array.isArray(content)) {
    throw new RunnerError("the file holds no object", where, NEW_FOLDER);
  }
  return content;
}

function hex(bytes) {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
