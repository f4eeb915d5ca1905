//! Where a machine's RAM blocks are in its QEMU's address space, as `info ramblock` tells.

/// A RAM block of a running QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlockAddress {
    /// QEMU's name, such as `pc.ram`; the migration stream uses the same one.
    pub name: String,
    /// Size of the host pages behind it.
    pub page_bytes: u64,
    /// Where it is in QEMU's own numbering of RAM (not a guest address).
    pub offset: u64,
    /// Its size now; what the migration stream lists.
    pub used_bytes: u64,
    /// The size that it can grow to.
    pub total_bytes: u64,
    /// Where it begins in the process; `None` if this QEMU doesn't say: before 8.0 it has no such column.
    pub host_address: Option<u64>,
}

/// The answer to `info ramblock` isn't what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RamBlockError {
    /// It doesn't begin with the names of the columns.
    #[error("\"info ramblock\" has other columns than expected: \"{0}\"")]
    Heading(String),
    /// A line that isn't a block.
    #[error("\"info ramblock\" line not understood: \"{0}\"")]
    Line(String),
}

/// Reads the answer to the monitor command `info ramblock` (through QMP: `human-monitor-command`).
///
/// The order is QEMU's list, largest block first; blocks that don't migrate are in it too. Match them with the stream's
/// list by name, never by position.
///
/// ```
/// let answer = "\
///               Block Name    PSize              Offset               Used              Total                HVA  RO\r
///                   pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007f4a5be00000  rw\r
/// ";
/// let blocks = godwit_qemu::ramblock::parse(answer)?;
/// assert_eq!((blocks[0].name.as_str(), blocks[0].used_bytes), ("pc.ram", 64 << 20));
/// assert_eq!(blocks[0].host_address, Some(0x7f4a_5be0_0000));
/// # Ok::<(), godwit_qemu::ramblock::RamBlockError>(())
/// ```
///
/// # Errors
/// The heading or a line can't be read; the error quotes it.
pub fn parse(answer: &str) -> Result<Vec<RamBlockAddress>, RamBlockError> {
    let mut lines = answer.lines().map(str::trim_end).filter(|line| !line.is_empty());
    let heading = lines.next().unwrap_or_default();
    let columns: Vec<&str> = heading.split_whitespace().collect();
    let says_address = match columns[..] {
        ["Block", "Name", "PSize", "Offset", "Used", "Total"] => false,
        ["Block", "Name", "PSize", "Offset", "Used", "Total", "HVA", "RO"] => true,
        _ => return Err(RamBlockError::Heading(heading.trim_start().to_owned())),
    };
    let block = |line| block(line, says_address).ok_or_else(|| RamBlockError::Line(unpadded(line)));
    lines.map(block).collect()
}

fn unpadded(line: &str) -> String {
    line.trim_start().to_owned()
}

/// Reads the answer to the monitor command `gpa2hva`: the memory at a guest's address, by the name of its RAM block, and
/// where it is in the process.
///
/// ```
/// let answer = "Host virtual address for 0x0 (pc.ram) is 0x7fc70fe00000\r\n";
/// assert_eq!(godwit_qemu::ramblock::parse_address(answer), Some(("pc.ram", 0x7fc7_0fe0_0000)));
/// ```
pub fn parse_address(answer: &str) -> Option<(&str, u64)> {
    let (rest, address) = answer.trim_end().rsplit_once(" is ")?;
    let name = rest.split_once('(')?.1.strip_suffix(')')?;
    Some((name, hexadecimal(address)?))
}

/// From the right, because only the name, which comes first, can have spaces in it.
fn block(line: &str, says_address: bool) -> Option<RamBlockAddress> {
    let (rest, host_address) = if says_address {
        let (rest, _read_only) = last_field(line)?;
        let (rest, address) = last_field(rest)?;
        (rest, Some(hexadecimal(address)?))
    } else {
        (line, None)
    };
    let (rest, total) = last_field(rest)?;
    let (rest, used) = last_field(rest)?;
    let (rest, offset) = last_field(rest)?;
    let (rest, unit) = last_field(rest)?;
    let (name, number) = last_field(rest)?;
    Some(RamBlockAddress {
        name: name.trim().to_owned(),
        page_bytes: size(number, unit)?,
        offset: hexadecimal(offset)?,
        used_bytes: hexadecimal(used)?,
        total_bytes: hexadecimal(total)?,
        host_address,
    })
}

fn last_field(line: &str) -> Option<(&str, &str)> {
    line.trim_end().rsplit_once(char::is_whitespace)
}

fn hexadecimal(field: &str) -> Option<u64> {
    u64::from_str_radix(field.strip_prefix("0x")?, 16).ok()
}

fn size(number: &str, unit: &str) -> Option<u64> {
    let shift = match unit {
        "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Of QEMU 7.2.
    const OLD_HEADING: &str = "Block Name    PSize              Offset               Used              Total";
    const HEADING: &str = "Block Name    PSize              Offset               Used              Total                HVA  RO";

    proptest! {
        #[test]
        fn any_block_is_read_back(
            name in "[a-z/][ a-z0-9/:@.-]{0,60}[a-z0-9]",
            page_bytes in 1u64..1024,
            (shift, unit) in prop_oneof![Just((10, "KiB")), Just((20, "MiB")), Just((30, "GiB"))],
            numbers in any::<[u64; 4]>(),
            says_address in any::<bool>(),
        ) {
            let [offset, used, total, host] = numbers;
            let page = format!("{page_bytes} {unit}");
            let line = format!("{name:>24} {page:>8}  {offset:#018x} {used:#018x} {total:#018x}");
            let (heading, line) = if says_address {
                (HEADING, format!("{line} {host:#018x}  rw"))
            } else {
                (OLD_HEADING, line)
            };
            let expected = RamBlockAddress {
                name,
                page_bytes: page_bytes << shift,
                offset,
                used_bytes: used,
                total_bytes: total,
                host_address: says_address.then_some(host),
            };
            prop_assert_eq!(parse(&format!("{heading}\r\n{line}\r\n")), Ok(vec![expected]));
        }

        #[test]
        fn any_text_is_an_answer_or_an_error(text in "(.|\n){0,300}") {
            parse(&format!("{HEADING}\n{text}")).ok();
            parse(&format!("{OLD_HEADING}\n{text}")).ok();
            parse_address(&text);
        }
    }

    #[test]
    fn an_error_quotes_the_line() {
        let line = RamBlockError::Line("pc.ram 4 KiB 0x0 oops 0x0 0x0 rw".into());
        assert_eq!(parse(&format!("{HEADING}\n  pc.ram 4 KiB 0x0 oops 0x0 0x0 rw\r\n")), Err(line));
        assert_eq!(parse("unknown command"), Err(RamBlockError::Heading("unknown command".into())));
    }
}
