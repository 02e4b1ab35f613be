//! The last fencing token, kept in the lock file for all processes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use dlock_core::Mode;

use super::super::byte::Byte;
use super::{LockFile, system_error};
use crate::sqlite::function_error::FunctionError;

/// The byte that a process locks while it draws. It is also one of the lock with this number: the last one, which no
/// `i64` is, and a hash with a probability of 1 in 2⁶⁰.
const DRAWING: (u64, Byte) = ((1 << 61) - 1, Byte::Upgrading);

/// As many digits as the greatest token has, and the end of the line.
const LENGTH: usize = 20;

impl LockFile {
    /// Draws a token that is greater than the last one and not less than `least`. Returns `None` while another process
    /// draws one.
    pub(in crate::sqlite) fn draw_token(
        &mut self,
        least: i64,
    ) -> Result<Option<i64>, FunctionError> {
        let (key, byte) = DRAWING;
        let Some(drawing) = self.lock(key, byte, Mode::Exclusive)? else {
            return Ok(None);
        };
        let file = &drawing.open.file;
        let last = read(file).map_err(system_error)?;
        let token = last.map_or(least, |last| least.max(last.saturating_add(1)));
        write(file, token).map_err(system_error)?;
        Ok(Some(token))
    }
}

/// The last token. `None` if there is none, or if what is there is none, after a loss of power: the clock, by which the
/// next one is at least as great, then keeps the order.
fn read(file: &File) -> io::Result<Option<i64>> {
    let mut text = [0; LENGTH];
    let length = file.read_at(&mut text, 0)?;
    let text = std::str::from_utf8(&text[..length]).ok();
    Ok(text.and_then(|text| text.strip_suffix('\n')?.parse().ok()))
}

/// Always of the same length, so that no rest of a longer number can stay behind it.
fn write(file: &File, token: i64) -> io::Result<()> {
    file.write_all_at(format!("{token:019}\n").as_bytes(), 0)
}
