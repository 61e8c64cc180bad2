//! Checkpoints from disk.

mod support;

#[test]
fn pair_writes() {
    let pair = support::write_pair(&support::Target::default(), &support::Drafter::default());
    assert!(pair.target.join("tokenizer.json").exists());
    let tokenizer = tokenizers::Tokenizer::from_file(pair.target.join("tokenizer.json")).unwrap();
    let ids = tokenizer.encode("Hello you.<|endoftext|>", false).unwrap();
    assert_eq!(tokenizer.decode(ids.get_ids(), true).unwrap(), "Hello you.");
    assert_eq!(ids.get_ids().last(), Some(&0));
    assert_eq!(ids.get_ids().len(), 11);
    assert_eq!(tokenizer.get_vocab_size(true), 97);
}
