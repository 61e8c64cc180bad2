use dflash::*; use dflash::engine::*; use dflash::weights::*;
struct Quiet;
impl Listener for Quiet { fn token(&mut self, _: u32, _: bool) -> Result<Flow> { Ok(Flow::Continue) } }
fn main() {
    let t = reference::Target::load(config::TargetConfig::open(&DEMO_TARGET).unwrap(), &Checkpoint::open(&DEMO_TARGET).unwrap()).unwrap();
    let d = reference::Drafter::load(config::DrafterConfig::open(&DEMO_DRAFTER).unwrap(), &Checkpoint::open(&DEMO_DRAFTER).unwrap()).unwrap();
    let o: serde_json::Value = serde_json::from_str(include_str!("../tests/data/oracle.json")).unwrap();
    let prompts: Vec<Vec<u32>> = o["prompts"].as_array().unwrap().iter().map(|p| p["prompt_ids"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()).collect();
    cpu::install(|| for block in [1, 16, 1, 16] {
        let (mut tok, mut pre, mut dec, mut rounds) = (0, 0.0, 0.0, 0);
        for p in &prompts[..12] {
            let r = Request { prompt: p.clone(), max_tokens: 128, sampling: verify::Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0, stream: 0 }, stop_ids: vec![0], block };
            let o = generate(&mut reference::Sequence::new(&t, Some(&d)), &r, &mut Quiet).unwrap();
            tok += o.tokens.len(); pre += o.prefill.as_secs_f64(); dec += o.decode.as_secs_f64(); rounds += o.accepted.len();
        }
        println!("block {block}: prefill {:.2} ms each, decode {:.0} tok/s, overall {:.0} tok/s, {:.0} us/round", pre / 12. * 1e3, tok as f64 / dec, tok as f64 / (pre + dec), dec / rounds as f64 * 1e6);
    });
}
