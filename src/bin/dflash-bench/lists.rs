//! Values of flags: lists of numbers, counts, percentages.

/// A LIST of whole numbers. It has its own type because clap reads a `Vec` as a repeated flag.
#[derive(Clone, Debug, PartialEq)]
pub struct WholeNumbers(pub Vec<usize>);

/// A LIST of numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Numbers(pub Vec<f64>);

/// A parsed value, or what was expected.
pub type Parsed<T> = std::result::Result<T, String>;

/// Numbers in a list, and the largest count.
const MOST: usize = 1000;

/// Reads a LIST of numbers.
pub fn numbers(text: &str) -> Parsed<Numbers> {
    let mut all = vec![];
    for part in text.split(',') {
        range(part, &mut all)?;
    }
    Ok(Numbers(all))
}

/// Reads a LIST of whole numbers up to a billion.
pub fn whole_numbers(text: &str) -> Parsed<WholeNumbers> {
    let Numbers(all) = numbers(text)?;
    match all.iter().find(|n| n.fract() != 0.0 || **n > 1e9) {
        Some(n) => Err(format!("{n} is not a whole number up to 1000000000")),
        None => Ok(WholeNumbers(all.into_iter().map(|n| n as usize).collect())),
    }
}

/// Appends `N`, `FIRST-LAST`, `FIRST-LAST+STEP` or `FIRST-LAST*FACTOR`, the forms of llama-bench.
fn range(part: &str, all: &mut Vec<f64>) -> Parsed<()> {
    let number = |text: &str| {
        let digits = !text.is_empty() && text.chars().all(|c| c.is_ascii_digit() || c == '.');
        let number: Option<f64> = text.parse().ok().filter(|_| digits);
        number
            .ok_or_else(|| format!("{text:?} is not a number: expected for example 4,8 or 1-8 or 512-4096*2"))
    };
    let Some((first, rest)) = part.split_once('-') else {
        all.push(number(part)?);
        return if all.len() > MOST { Err(format!("more than {MOST} numbers")) } else { Ok(()) };
    };
    let (last, step, factor) = match (rest.split_once('+'), rest.split_once('*')) {
        (Some((last, step)), _) => (last, number(step)?, 1.0),
        (_, Some((last, factor))) => (last, 0.0, number(factor)?),
        _ => (rest, 1.0, 1.0),
    };
    let (first, last) = (number(first)?, number(last)?);
    if last < first || (factor == 1.0 && step <= 0.0) || factor < 1.0 || (factor > 1.0 && first == 0.0) {
        return Err(format!("{part:?} has no end: expected FIRST-LAST+STEP or FIRST-LAST*FACTOR, upwards"));
    }
    for i in 0.. {
        let next = if factor > 1.0 { first * factor.powi(i) } else { first + step * f64::from(i) };
        // The end counts as reached where only rounding separates them.
        if next > last * (1.0 + 1e-12) {
            break;
        }
        all.push(next);
        if all.len() > MOST {
            return Err(format!("more than {MOST} numbers"));
        }
    }
    Ok(())
}

/// Reads a whole number from 1 to [`MOST`].
pub fn sample_count(text: &str) -> Parsed<usize> {
    let number = text.parse().ok().filter(|n| (1..=MOST).contains(n));
    number.ok_or_else(|| format!("expected a whole number from 1 to {MOST}"))
}

/// Reads a finite number above 0.
pub fn above_zero(text: &str) -> Parsed<f64> {
    let number: Option<f64> = text.parse().ok().filter(|x: &f64| x.is_finite() && *x > 0.0);
    number.ok_or_else(|| "expected a number above 0".into())
}

/// Reads `1%` as 0.01.
pub fn percent(text: &str) -> Parsed<f64> {
    let number: Option<f64> = text.strip_suffix('%').and_then(|text| text.parse().ok());
    let fraction = number.filter(|x| (0.0..100.0).contains(x)).map(|x| x / 100.0);
    fraction.ok_or_else(|| "expected a percentage from 0% to below 100%".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_have_the_forms_of_llama_bench() {
        let read = |text| whole_numbers(text).map(|list| list.0);
        assert_eq!(read("4"), Ok(vec![4]));
        assert_eq!(read("1-4,16"), Ok(vec![1, 2, 3, 4, 16]));
        assert_eq!(read("1-16+5"), Ok(vec![1, 6, 11, 16]));
        assert_eq!(read("1-15+5"), Ok(vec![1, 6, 11]));
        assert_eq!(read("0-2"), Ok(vec![0, 1, 2]));
        assert_eq!(read("512-32768*2"), Ok(vec![512, 1024, 2048, 4096, 8192, 16384, 32768]));
        assert_eq!(read("5-100*3,7-7"), Ok(vec![5, 15, 45, 7]));
        assert_eq!(numbers("1.5,2-3+0.25"), Ok(Numbers(vec![1.5, 2.0, 2.25, 2.5, 2.75, 3.0])));
        // 0.1 is not exact in binary; the end still counts.
        assert_eq!(numbers("0-0.3+0.1").unwrap().0.len(), 4);
        for wrong in [
            "",
            "1,",
            "x",
            "-4",
            "1-",
            "4-1",
            "1-4+0",
            "1-8*1",
            "1-8*0",
            "0-8*2",
            "1e3",
            "1.5",
            "1-9-2",
            "1-2+3*4",
            "inf",
            "NaN",
            "1-2000",
            "9999999999",
        ] {
            assert!(read(wrong).is_err(), "{wrong:?}: {:?}", read(wrong));
        }
    }

    #[test]
    fn percentages_need_a_percent_sign() {
        assert_eq!(percent("1%"), Ok(0.01));
        assert_eq!(percent("0%"), Ok(0.0));
        assert!(["1", "-1%", "100%", "%", "NaN%"].iter().all(|text| percent(text).is_err()));
    }
}
