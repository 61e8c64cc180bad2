//! How wide a table on stdout may be.

use std::io::IsTerminal;

/// Characters of a line where stdout is no terminal.
const PIPED: usize = 100;
/// Tables are not made narrower than this.
const LEAST: usize = 40;

/// Characters of a line: `COLUMNS` if it is set, else the width of the terminal, else 100.
pub fn columns() -> usize {
    let set = std::env::var("COLUMNS").ok().and_then(|text| text.parse().ok());
    set.or_else(terminal).unwrap_or(PIPED).max(LEAST)
}

fn terminal() -> Option<usize> {
    if !std::io::stdout().is_terminal() {
        return None;
    }
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one `winsize`, which lives until the call returns.
    let done = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &mut size) };
    (done == 0 && size.ws_col > 0).then_some(size.ws_col.into())
}
