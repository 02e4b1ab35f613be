//! The keys of DistributedLock 2.8.1 for .NET, read from its `PostgresAdvisoryLockKey.cs` and
//! `MySqlDistributedLock.cs`: <https://github.com/madelson/DistributedLock>

use sha1::Sha1;
use sha2::{Digest, Sha512};

use crate::key::preset;
use crate::key::{Leaf, LockKey, PostgresKey, Preset};

static DISTRIBUTED_LOCK: Preset = Preset {
    name: "distributed-lock",
    postgres: Some(to_postgres),
    mysql: Some(to_mysql),
};

impl LockKey {
    /// The lock that .NET's [DistributedLock] takes for `key`.
    ///
    /// On PostgreSQL `key` is the argument of `PostgresAdvisoryLockKey`, for text with `allowHashing: true`, which that
    /// library's providers also use. On MySQL and MariaDB it is the name of a `MySqlDistributedLock` without
    /// `exactName`; with `exactName: true` use [`mysql_name`](Self::mysql_name). The values were checked against
    /// version 2.8.1.
    ///
    /// It is not separate from other keys: that library reads text of 16 hexadecimal digits as a number, and on MySQL
    /// and MariaDB it uses short lower-case text as it is.
    ///
    /// [DistributedLock]: https://github.com/madelson/DistributedLock
    ///
    /// # Examples
    ///
    /// ```
    /// use dlock_core::{LockKey, PostgresKey};
    ///
    /// let key = LockKey::distributed_lock("ABC");
    /// assert_eq!(key.to_mysql()?, "abczj4qr6tvn4a3kmgq4bukhowqyfrlxsb3");
    /// assert_eq!(key.to_string(), r#"distributed-lock "ABC""#);
    ///
    /// // That library packs short ASCII text into a pair and hashes longer text.
    /// let short = LockKey::distributed_lock("nightly");
    /// assert_eq!(short.to_postgres()?, PostgresKey::Pair(-576242034, -1690517505));
    /// let long = LockKey::distributed_lock("some very long name");
    /// assert_eq!(long.to_postgres()?, PostgresKey::BigInt(1765484347666752899));
    /// # Ok::<(), dlock_core::InvalidKey>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The mapping to a server returns [`InvalidKey`](crate::InvalidKey) for what that library does not have:
    ///
    /// - everywhere bytes that are not UTF-8, a namespaced key, another preset, or a preset inside a namespace;
    /// - on MySQL and MariaDB numbers and pairs;
    /// - there also text with an upper-case letter beyond ASCII, whose lower case depends on the version of .NET, and
    ///   text whose lock name has a NUL or a character beyond U+FFFF;
    /// - on SQLite every key.
    ///
    /// # Backend differences
    ///
    /// - MariaDB: text beyond ASCII is the same lock only for connections with the same character set.
    pub fn distributed_lock(key: impl Into<LockKey>) -> LockKey {
        LockKey::plain(Leaf::Preset(&DISTRIBUTED_LOCK, Box::new(key.into())))
    }
}

fn to_postgres(key: &LockKey) -> Result<PostgresKey, &'static str> {
    let text = match preset::leaf(key)? {
        Leaf::Integer(number) => return Ok(PostgresKey::BigInt(*number)),
        Leaf::Pair(first, second) => return Ok(PostgresKey::Pair(*first, *second)),
        other => preset::text(other)?,
    };
    Ok(packed(text)
        .or_else(|| parsed(text.as_bytes()))
        .unwrap_or_else(|| {
            let digest = Sha1::digest(text);
            let (hash, _) = digest.split_first_chunk().expect("BUG: SHA-1 has 20 bytes");
            PostgresKey::BigInt(i64::from_le_bytes(*hash))
        }))
}

/// Up to 9 ASCII characters of 7 bits each, then a 0, then as many 1 as are left of 64 bits.
fn packed(text: &str) -> Option<PostgresKey> {
    if text.len() > 9 || !text.is_ascii() {
        return None;
    }
    let characters = text
        .bytes()
        .fold(0, |bits, byte| bits << 7 | u64::from(byte));
    let bits = (text.len()..9).fold(characters << 1, |bits, _| bits << 7 | 0x7f);
    Some(PostgresKey::Pair((bits >> 32) as i32, bits as i32))
}

/// A number of 16 hexadecimal digits, or a pair of 8 each.
fn parsed(text: &[u8]) -> Option<PostgresKey> {
    let (first, second) = match text.len() {
        16 => (half(&text[..8])?, half(&text[8..])?),
        17 if text[8] == b',' => {
            return Some(PostgresKey::Pair(
                half(&text[..8])? as i32,
                half(&text[9..])? as i32,
            ));
        }
        _ => return None,
    };
    Some(PostgresKey::BigInt(
        (u64::from(first) << 32 | u64::from(second)) as i64,
    ))
}

/// .NET ignores NULs behind the digits.
fn half(digits: &[u8]) -> Option<u32> {
    let digits = std::str::from_utf8(digits).ok()?.trim_end_matches('\0');
    if digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        u32::from_str_radix(digits, 16).ok()
    } else {
        None
    }
}

/// .NET counts in units of UTF-16.
const LONGEST: usize = 64;

fn to_mysql(key: &LockKey) -> Result<String, &'static str> {
    let text = preset::text(preset::leaf(key)?)?;
    if text
        .chars()
        .any(|letter| !letter.is_ascii() && !letter.to_lowercase().eq([letter]))
    {
        return Err(
            "contains an upper-case letter beyond ASCII, whose lower case depends on the version of .NET: \
                    use lower case, in every program",
        );
    }
    let valid = match text {
        "" => "__empty__".to_owned(),
        _ => text.to_ascii_lowercase(),
    };
    if valid == text && text.encode_utf16().count() <= LONGEST {
        return preset::lock_name(text);
    }
    let hash = base32(&Sha512::digest(text));
    let start: String = valid.chars().take(LONGEST - hash.len()).collect();
    preset::lock_name(&(start + &hash))
}

/// 160 bits as 32 characters, each from the lowest bits that are left.
fn base32(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    (0..32)
        .map(|index| {
            let five_bits = (0..5).fold(0, |bits, place| {
                let bit = index * 5 + place;
                bits | (bytes[bit / 8] >> (bit % 8) & 1) << place
            });
            char::from(ALPHABET[usize::from(five_bits)])
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use PostgresKey::{BigInt, Pair};

    #[test]
    fn postgresql_keys_are_that_librarys() {
        for (text, expected) in [
            // Published in the library's tests.
            (&*"漢".repeat(18), BigInt(-5707277204051710361)),
            ("0000000000000001", BigInt(1)),
            ("00000003,ffffffff", Pair(3, -1)),
            (&"\0".repeat(9), Pair(0, 0)),
            // Returned by the library's code.
            ("", Pair(i32::MAX, -1)),
            ("a", Pair(-1023410177, -1)),
            ("123456789", Pair(1657379654, -1382303630)),
            ("\0", Pair(16777215, -1)),
            ("\x7f", Pair(-16777217, -1)),
            ("0123456789", BigInt(2363718883634621575)),
            ("café", BigInt(-8317739947985132300)),
            ("FFFFFFFFffffffff", BigInt(-1)),
            ("0000000g00000000", BigInt(7412081691610215600)),
            (" 000000000000001", BigInt(358449629449209684)),
            ("+0000001,00000002", BigInt(-348918743934853667)),
            ("1234567\0,00000002", Pair(0x1234567, 2)),
            ("00000001 00000002", BigInt(-5534415899291527469)),
        ] {
            assert_eq!(
                LockKey::distributed_lock(text).to_postgres(),
                Ok(expected),
                "{text:?}"
            );
        }
        assert_eq!(
            LockKey::distributed_lock(-42).to_postgres(),
            Ok(BigInt(-42))
        );
        assert_eq!(
            LockKey::distributed_lock((1, -2)).to_postgres(),
            Ok(Pair(1, -2))
        );
    }

    #[test]
    fn mysql_keys_are_that_librarys() {
        let slashes = r"\".repeat(64);
        for (text, expected) in [
            // Published in the library's tests.
            ("", "__empty__p6ad62yppho33ytkibum5wbqhqvbcsxa"),
            ("abc", "abc"),
            ("ABC", "abczj4qr6tvn4a3kmgq4bukhowqyfrlxsb3"),
            (&slashes, &*slashes),
            (
                &"x".repeat(65),
                "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxgkd2zq6c6ey6mhs45clqg7vij6ycgo43",
            ),
            // Returned by the library's code.
            ("café", "café"),
            ("User/001", "user/001buqpbmliqkrrgziggkfsbu4uhjz5jipo"),
            (
                &"X".repeat(64),
                "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxcevrxkxrbxapl3o6n3g4yvz52pykjkly",
            ),
        ] {
            assert_eq!(
                LockKey::distributed_lock(text).to_mysql().as_deref(),
                Ok(expected),
                "{text}"
            );
        }
    }

    #[test]
    fn what_mysql_or_that_library_lacks_is_no_lock() {
        for key in [
            LockKey::distributed_lock(1),
            LockKey::distributed_lock((1, 2)),
            LockKey::distributed_lock("a\0b"),
            LockKey::distributed_lock("🔒"),
            LockKey::distributed_lock("É"),
            LockKey::distributed_lock("İ"),
        ] {
            assert_eq!(key.to_mysql().unwrap_err().key(), &key);
        }
        assert!(LockKey::distributed_lock(b"\xff").to_postgres().is_err());
        assert!(
            LockKey::distributed_lock(LockKey::namespaced("a", "b"))
                .to_postgres()
                .is_err()
        );
        assert!(LockKey::distributed_lock("a").to_sqlite().is_err());
    }
}
