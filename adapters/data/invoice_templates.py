"""Wordings and slot values of the invoice generator.

A field whose placeholder is absent from a template is null in the answer.
"""

from adapters.data.core import Vocab

VENDORS = Vocab(
    train=(
        "Baker & Sons", "Nordlicht GmbH", "Acme Supplies", "Papier Plus", "Green Valley Farm", "Orion Tools",
        "Blue Harbor Ltd", "Castillo Office", "Maple Print Co.", "Steelworks AG", "Fresh Roast", "Tanaka Trading",
        "Lindqvist AB", "Pixel Hardware", "Sunrise Bakery", "Delta Logistics", "Hillside Nursery", "Kovacs Textiles",
        "Quick Parts Inc.", "River Glass", "Monte Verde", "Schmidt Elektro", "Harper Paints", "Union Cables",
    ),
    heldout=(
        "Falcon Fasteners", "Weber Optik", "Juniper Foods", "Atlas Ceramics", "Olsen Marine", "Petit Atelier",
        "Crown Stationers", "Zenith Lighting", "Moreau & Fils", "Bright Pine Ltd",
    ),
)  # fmt: skip

ITEMS = Vocab(
    train=(
        "desk lamp", "office chair", "printer paper", "USB cable", "coffee beans", "whiteboard marker", "safety gloves",
        "garden hose", "wall clock", "steel bolt", "paint roller", "cotton towel", "glass jar", "phone case",
        "wooden shelf", "toner cartridge", "apple crate", "LED bulb", "notebook", "water filter", "door handle",
        "tea pot", "extension cord", "cardboard box", "rubber seal", "bicycle tyre", "flower pot", "keyboard",
    ),
    heldout=(
        "ceiling fan", "hard hat", "picture frame", "olive oil", "webcam", "copper pipe", "linen apron", "tripod",
        "filing cabinet", "bread knife", "ink roller", "life jacket",
    ),
)  # fmt: skip

TEMPLATES = (
    "INVOICE {number}\nFrom: {vendor}\nDate: {date}\n{quantity} x {item} @ {price}\nTotal due: {total}",
    "{vendor}\nInvoice no. {number}\nIssued: {date}\nItem: {item}\nQty: {quantity}\nAmount: {total}",
    "Hi, this is {vendor}. On {date} you ordered {quantity} x {item} for {total}. Your invoice number is {number}.",
    "Please book invoice {number} from {vendor}, dated {date}: {quantity} x {item}, {total} in all.",
    "We bought {quantity} x {item} from {vendor} on {date}. They charged us {total}.",
    "Hello, could you order {quantity} x {item} at {vendor}? It should be about {total}.",
    "Receipt {number} - {vendor} - {date} - {item} (qty {quantity}) - {total} paid by card",
    "{vendor} here. Your order {number} ({item}, {quantity} pieces) has shipped. Total: {total}.",
    "Purchase order {number}\nSupplier: {vendor}\nPlease deliver {quantity} x {item} at {price} each.\nSum: {total}",
    "Reminder: invoice {number} of {date} from {vendor} over {total} has not been paid.",
    "Order from {date}\nArticle: {item}\nPieces: {quantity}\nUnit price: {price}\nTotal: {total}\nSeller: {vendor}",
    "Got the bill from {vendor} today, no. {number}. {total} for {quantity} x {item}.",
    "Thank you for shopping with {vendor}! Order {number}, placed on {date}: {item}, quantity {quantity}, {total}.",
    "Dear customer, on {date} we delivered {quantity} x {item}. Please transfer {total} to {vendor}, quoting {number}.",
    "Can you check order {number}? I asked for {quantity} x {item} on {date}, and nothing has come yet.",
    "Seller: {vendor} | No: {number} | Date: {date} | {item} x {quantity} | {total}",
    "I paid {total} to {vendor} on {date} for {item}.",
    "{date}: {vendor}, {item}, {quantity} pcs at {price}, total {total}, ref {number}",
    "Just signed for a parcel from {vendor}: {quantity} x {item}, delivery note {number}, dated {date}.",
    "New order {number} received on {date}: {quantity} x {item}, value {total}.",
)

HELDOUT_TEMPLATES = (
    "To: Main office\nBill no.: {number}\nBiller: {vendor}\nDay: {date}\nGoods: {quantity} x {item}\nPayable: {total}",
    "{vendor} sent us invoice {number} for {total}. It covers {quantity} x {item} and is dated {date}.",
    "On {date} I picked up {quantity} x {item} at {vendor}, and it came to {total}.",
    "Quick note for accounting: {total} went to {vendor} ({quantity} x {item}), document {number}.",
    "Your {vendor} order is confirmed.\nOrder: {number}\nPlaced: {date}\n{item} - {quantity} pcs\nTo pay: {total}",
    "Where is my parcel? Order {number}, {quantity} x {item}, bought from {vendor} on {date}.",
    "Credit card slip, {date}: {vendor}, {total}, {item}.",
)

NOTES = Vocab(
    train=(
        "Payable within 30 days.", "Delivery is free.", "VAT included.", "Call 555-0142 with questions.",
        "Please leave it at the reception.", "Thanks, Sam", "Shipping takes 3 days.", "Account manager: Ms Field.",
        "Returns accepted for 14 days.", "Paid by bank transfer.",
    ),
    heldout=(
        "Payment within 10 days.", "Gate code is 4471.", "All prices include tax.", "Regards, Mira",
        "Support line: 555-0199.",
    ),
)  # fmt: skip
