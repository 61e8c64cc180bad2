//! The values of `--verify`.

use crate::spec::verify::VerifyMethod;
use clap::builder::PossibleValue;

impl clap::ValueEnum for VerifyMethod {
    fn value_variants<'a>() -> &'a [VerifyMethod] {
        &[VerifyMethod::Match, VerifyMethod::Rejection, VerifyMethod::Block]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let help = match self {
            VerifyMethod::Match => "Drafts equal to the tokens that AR decoding emits with the same seed",
            VerifyMethod::Rejection => "Token by token with probability p/q; keeps the target's distribution",
            VerifyMethod::Block => "Whole blocks with probability p/q; keeps the target's distribution",
        };
        Some(PossibleValue::new(self.name()).help(help))
    }
}
