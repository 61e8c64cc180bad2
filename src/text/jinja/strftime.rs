//! Python's `strftime`.

use std::time::Duration;

/// Python's `strftime` in the C locale for a UTC time since 1970, with glibc's `-` flag for numbers without
/// padding.
///
/// # Errors
/// A sentence if the format has a directive that is not supported.
pub(crate) fn format(format: &str, time: Duration) -> Result<String, String> {
    const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
    const MONTHS: [(&str, u64); 12] = [
        ("January", 31),
        ("February", 28),
        ("March", 31),
        ("April", 30),
        ("May", 31),
        ("June", 30),
        ("July", 31),
        ("August", 31),
        ("September", 30),
        ("October", 31),
        ("November", 30),
        ("December", 31),
    ];
    let leap = |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    let seconds = time.as_secs();
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    // The first day of 1970 was a Thursday. Weekdays count from Sunday.
    let weekday = (seconds / 86400 + 4) % 7;
    // The year of a day since 1970, and the days since it began.
    let year_and_day = |mut day: u64| {
        let mut year = 1970;
        while day >= 365 + u64::from(leap(year)) {
            day -= 365 + u64::from(leap(year));
            year += 1;
        }
        (year, day)
    };
    let (year, mut day) = year_and_day(seconds / 86400);
    // A week of ISO 8601 belongs to the year of its Thursday.
    let (iso_year, thursday) = year_and_day(seconds / 86400 + 3 - (weekday + 6) % 7);
    let day_of_year = day + 1;
    let mut month = 0;
    while day >= MONTHS[month].1 + u64::from(month == 1 && leap(year)) {
        day -= MONTHS[month].1 + u64::from(month == 1 && leap(year));
        month += 1;
    }
    let weekday_name = DAYS[weekday as usize];
    let (month_name, month, day) = (MONTHS[month].0, month as u64 + 1, day + 1);

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let padded = directive != Some('-');
        if !padded {
            directive = chars.next();
        }
        let mut number = |value: u64, width: usize, fill: char| {
            let digits = value.to_string();
            let missing = if padded { width.saturating_sub(digits.len()) } else { 0 };
            out.extend(std::iter::repeat_n(fill, missing));
            out.push_str(&digits);
        };
        match directive {
            Some('Y') => number(year, 4, '0'),
            Some('y') => number(year % 100, 2, '0'),
            Some('m') => number(month, 2, '0'),
            Some('d') => number(day, 2, '0'),
            Some('e') => number(day, 2, ' '),
            Some('j') => number(day_of_year, 3, '0'),
            Some('H') => number(hour, 2, '0'),
            Some('I') => number((hour + 11) % 12 + 1, 2, '0'),
            Some('M') => number(minute, 2, '0'),
            Some('S') => number(second, 2, '0'),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('B') => out.push_str(month_name),
            Some('b' | 'h') => out.push_str(&month_name[..3]),
            Some('C') => number(year / 100, 2, '0'),
            Some('k') => number(hour, 2, ' '),
            Some('l') => number((hour + 11) % 12 + 1, 2, ' '),
            Some('f') => number(time.subsec_micros().into(), 6, '0'),
            Some('s') => number(seconds, 1, '0'),
            Some('w') => number(weekday, 1, '0'),
            Some('u') => number((weekday + 6) % 7 + 1, 1, '0'),
            // Weeks of the year that begin with a Sunday, and with a Monday.
            Some('U') => number((day_of_year + 6 - weekday) / 7, 2, '0'),
            Some('W') => number((day_of_year + 6 - (weekday + 6) % 7) / 7, 2, '0'),
            Some('G') => number(iso_year, 4, '0'),
            Some('g') => number(iso_year % 100, 2, '0'),
            Some('V') => number(thursday / 7 + 1, 2, '0'),
            Some('A') => out.push_str(weekday_name),
            Some('a') => out.push_str(&weekday_name[..3]),
            Some('P') => out.push_str(if hour < 12 { "am" } else { "pm" }),
            Some('n') => out.push('\n'),
            Some('t') => out.push('\t'),
            Some('c') => out.push_str(&self::format("%a %b %e %H:%M:%S %Y", time)?),
            Some('D' | 'x') => out.push_str(&self::format("%m/%d/%y", time)?),
            Some('F') => out.push_str(&self::format("%Y-%m-%d", time)?),
            Some('R') => out.push_str(&self::format("%H:%M", time)?),
            Some('r') => out.push_str(&self::format("%I:%M:%S %p", time)?),
            Some('T' | 'X') => out.push_str(&self::format("%H:%M:%S", time)?),
            // Hugging Face formats a time without a time zone.
            Some('Z' | 'z') => {}
            Some('%') => out.push('%'),
            Some(other) => return Err(format!("strftime_now does not know %{other}")),
            None => return Err("strftime_now: the format ends in %".into()),
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::format;
    use std::time::Duration;

    #[test]
    fn dates_are_those_of_the_calendar() {
        // From Python: datetime.fromtimestamp(t, timezone.utc).replace(tzinfo=None).strftime(...)
        let directives = "%Y-%m-%d %H:%M:%S %j %a %b|%A %B %-d %e %I%p %y %F %T %Z%z 100%%|\
                          %c|%x|%X|%D|%R|%r|%s|%f|%U %W|%w %u|%C|%h|%k|%l|%P|%G %g %V|%n%t";
        for (seconds, micros, expected) in [
            (
                0,
                0,
                "1970-01-01 00:00:00 001 Thu Jan|Thursday January 1  1 12AM 70 1970-01-01 00:00:00  100%|Thu Jan  1 00:00:00 1970|01/01/70|00:00:00|01/01/70|00:00|12:00:00 AM|0|000000|00 00|4 4|19|Jan| 0|12|am|1970 70 01|\n\t",
            ),
            (
                946684799,
                0,
                "1999-12-31 23:59:59 365 Fri Dec|Friday December 31 31 11PM 99 1999-12-31 23:59:59  100%|Fri Dec 31 23:59:59 1999|12/31/99|23:59:59|12/31/99|23:59|11:59:59 PM|946684799|000000|52 52|5 5|19|Dec|23|11|pm|1999 99 52|\n\t",
            ),
            (
                951825601,
                7,
                "2000-02-29 12:00:01 060 Tue Feb|Tuesday February 29 29 12PM 00 2000-02-29 12:00:01  100%|Tue Feb 29 12:00:01 2000|02/29/00|12:00:01|02/29/00|12:00|12:00:01 PM|951825601|000007|09 09|2 2|20|Feb|12|12|pm|2000 00 09|\n\t",
            ),
            (
                978224523,
                123456,
                "2000-12-31 01:02:03 366 Sun Dec|Sunday December 31 31 01AM 00 2000-12-31 01:02:03  100%|Sun Dec 31 01:02:03 2000|12/31/00|01:02:03|12/31/00|01:02|01:02:03 AM|978224523|123456|53 52|0 7|20|Dec| 1| 1|am|2000 00 52|\n\t",
            ),
            (
                1709211909,
                0,
                "2024-02-29 13:05:09 060 Thu Feb|Thursday February 29 29 01PM 24 2024-02-29 13:05:09  100%|Thu Feb 29 13:05:09 2024|02/29/24|13:05:09|02/29/24|13:05|01:05:09 PM|1709211909|000000|08 09|4 4|20|Feb|13| 1|pm|2024 24 09|\n\t",
            ),
            (
                1772323200,
                999999,
                "2026-03-01 00:00:00 060 Sun Mar|Sunday March 1  1 12AM 26 2026-03-01 00:00:00  100%|Sun Mar  1 00:00:00 2026|03/01/26|00:00:00|03/01/26|00:00|12:00:00 AM|1772323200|999999|09 08|0 7|20|Mar| 0|12|am|2026 26 09|\n\t",
            ),
            (
                4107585599,
                0,
                "2100-03-01 11:59:59 060 Mon Mar|Monday March 1  1 11AM 00 2100-03-01 11:59:59  100%|Mon Mar  1 11:59:59 2100|03/01/00|11:59:59|03/01/00|11:59|11:59:59 AM|4107585599|000000|09 09|1 1|21|Mar|11|11|am|2100 00 09|\n\t",
            ),
            (
                1104537600,
                0,
                "2005-01-01 00:00:00 001 Sat Jan|Saturday January 1  1 12AM 05 2005-01-01 00:00:00  100%|Sat Jan  1 00:00:00 2005|01/01/05|00:00:00|01/01/05|00:00|12:00:00 AM|1104537600|000000|00 00|6 6|20|Jan| 0|12|am|2004 04 53|\n\t",
            ),
            (
                1230768000,
                0,
                "2009-01-01 00:00:00 001 Thu Jan|Thursday January 1  1 12AM 09 2009-01-01 00:00:00  100%|Thu Jan  1 00:00:00 2009|01/01/09|00:00:00|01/01/09|00:00|12:00:00 AM|1230768000|000000|00 00|4 4|20|Jan| 0|12|am|2009 09 01|\n\t",
            ),
        ] {
            let time = Duration::from_secs(seconds) + Duration::from_micros(micros);
            assert_eq!(format(directives, time).unwrap(), expected);
        }
        assert!(format("%Q", Duration::ZERO).unwrap_err().contains("%Q"));
        assert!(format("100%", Duration::ZERO).is_err());
    }
}
