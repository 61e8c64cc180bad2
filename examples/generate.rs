//! Prints one answer of the demo pair and its acceptance length.
//!
//! cargo run --release --example generate -- "def f(x):"

use dflash::{Engine, Models, Params};

fn main() -> dflash::Result<()> {
    let prompt = std::env::args().nth(1).unwrap_or("def f(x):".into());
    let engine = Engine::open(Models::demo())?;
    if let Some(reason) = engine.fallback() {
        eprintln!("running on the CPU: {reason}");
    }
    let answer =
        engine.generate(prompt.as_str(), Params::default().max_tokens(96).stop("\n\n\n"))?.finish()?;
    println!("{prompt}{}", answer.text);
    eprintln!(
        "{} tokens in {} rounds (acceptance length {:.2}), {:.0} tokens/s",
        answer.tokens().len(),
        answer.rounds(),
        answer.tau().unwrap_or(1.0),
        answer.tokens_per_second()
    );
    Ok(())
}
