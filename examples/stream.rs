//! Prints tokens as rounds produce them. Accepted drafts are green.
//!
//! cargo run --release --example stream -- "class Point:"

use dflash::{Engine, Models, Params};
use std::io::Write;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let prompt = std::env::args().nth(1).unwrap_or("class Point:".into());
    let engine = Engine::open(Models::demo())?;
    let params = Params::default().max_tokens(96).temperature(0.7).top_p(0.95).seed(1);

    let mut out = std::io::stdout();
    write!(out, "{prompt}")?;
    let mut rounds = 0;
    for token in engine.generate(prompt.as_str(), params)? {
        let token = token?;
        match token.accepted {
            true => write!(out, "\x1b[32m{}\x1b[0m", token.text)?,
            false => write!(out, "{}", token.text)?,
        }
        out.flush()?;
        rounds = token.round;
    }
    writeln!(out, "\n{rounds} rounds")?;
    Ok(())
}
