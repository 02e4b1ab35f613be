//! What must not compile, and what the compiler then says. After a change, `TRYBUILD=overwrite` writes the messages anew.

#[test]
fn misuse_does_not_compile() {
    trybuild::TestCases::new().compile_fail("tests/compile_fail/*.rs");
}
