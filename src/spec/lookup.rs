//! Drafts without a drafter: the tokens that followed an earlier occurrence of the last tokens. They are a
//! function of the tokens so far, so verification treats each as sampled with probability 1.

use crate::checkpoint::pair::Lookup;

/// The `count` tokens that follow the latest occurrence of the longest suffix of `tokens` that occurs earlier.
/// If `tokens` end before, the drafts go on with the first of them. Empty without such a suffix.
pub fn drafts(lookup: Lookup, tokens: &[u32], count: usize) -> Vec<u32> {
    let last = tokens.len().saturating_sub(1);
    let matched = |end: usize| {
        let pairs = tokens[..=end].iter().rev().zip(tokens.iter().rev());
        pairs.take(lookup.most).take_while(|(a, b)| a == b).count()
    };
    let best = (0..last).map(|end| (matched(end), end)).max().filter(|best| best.0 >= lookup.least);
    let Some((_, end)) = best else { return Vec::new() };
    (0..count).map(|i| tokens[end + 1 + i % (last - end)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_of_the_longest_matches_is_continued() {
        let drafts = |lookup: Lookup, tokens: &[u32]| drafts(lookup, tokens, 4);
        assert_eq!(drafts(Lookup::NGRAM, &[1, 2, 3, 4, 5, 6, 1, 2]), [3, 4, 5, 6]);
        // The latest of two, then the longer one.
        assert_eq!(drafts(Lookup::NGRAM, &[1, 2, 7, 1, 2, 8, 9, 1, 2]), [8, 9, 1, 2]);
        assert_eq!(drafts(Lookup::NGRAM, &[0, 1, 2, 7, 7, 1, 2, 8, 0, 1, 2]), [7, 7, 1, 2]);
        // One token is too few, and so is a text without repetition.
        assert_eq!(drafts(Lookup::NGRAM, &[1, 5, 1]), [0; 0]);
        assert_eq!(drafts(Lookup::NGRAM, &[1, 2, 3]), [0; 0]);
        assert_eq!(drafts(Lookup::NGRAM, &[]), [0; 0]);
        // Drafts beyond the end of the text repeat it from the match on.
        assert_eq!(drafts(Lookup::NGRAM, &[4, 4, 4]), [4; 4]);
        assert_eq!(drafts(Lookup::NGRAM, &[1, 2, 1, 2]), [1, 2, 1, 2]);
        // The last six tokens occur before the 9, the last five also before the 8.
        let tokens = [6, 1, 2, 3, 4, 5, 9, 7, 1, 2, 3, 4, 5, 8, 6, 1, 2, 3, 4, 5];
        assert_eq!(drafts(Lookup::NGRAM, &tokens)[0], 8);
        assert_eq!(drafts(Lookup::SUFFIX, &tokens)[0], 9);
    }
}
