//! Compares autoregressive decoding with DFlash on the same prompts: the tokens are identical, and DFlash
//! needs fewer target passes.
//!
//! cargo run --release --example compare

use dflash::{Engine, Models, Params, check_lossless};

const PROMPTS: [&str; 3] = ["def f(x):", "import os\nimport sys\n", "class Stack:\n    def __init__(self):"];

fn main() -> dflash::Result<()> {
    let engine = Engine::open(Models::demo())?;
    println!("prompt  tokens  AR tok/s  DFlash tok/s  rounds   tau  identical");
    for (i, prompt) in PROMPTS.into_iter().enumerate() {
        let params = Params::default().max_tokens(128);
        let ar = engine.generate(prompt, params.clone().autoregressive())?.finish()?;
        let speculative = engine.generate(prompt, params)?.finish()?;
        check_lossless(&ar.outcome, &speculative.outcome)?;
        println!(
            "{:6}  {:6}  {:8.0}  {:12.0}  {:6}  {:4.2}  yes",
            i + 1,
            speculative.tokens().len(),
            ar.tokens_per_second(),
            speculative.tokens_per_second(),
            speculative.rounds(),
            speculative.tau().unwrap_or(1.0)
        );
    }
    Ok(())
}
