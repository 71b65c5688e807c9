"""Pairs of a stilted or rude sentence and its plain version, and their slot values."""

from adapters.data.core import Vocab
from adapters.data.vocab import AMOUNTS, DAYS, TIMES

Pair = tuple[str, str]

VOCABS = {
    "day": DAYS, "amount": AMOUNTS, "time": TIMES,
    "paper": Vocab(
        ("application form", "tax return", "medical certificate", "signed lease", "proof of address", "travel claim",
         "birth certificate", "bank statement"),
        ("insurance policy", "residence permit", "building plan", "pension statement"),
    ),
    "office": Vocab(
        ("housing office", "tax office", "town hall", "personnel department", "licensing office"),
        ("customs office", "school board", "parking office"),
    ),
    "days": Vocab(("5", "7", "10", "14", "21", "28", "30", "60"), ("12", "15", "45", "90")),
    "object": Vocab(
        ("library card", "parking permit", "bicycle", "membership card", "locker key", "access badge"),
        ("season ticket", "swimming pass", "storage room key"),
    ),
    "work": Vocab(
        ("the roof repairs", "the road works", "the painting of the hall", "the lift repairs", "the window cleaning"),
        ("the pipe repairs", "the garden work", "the rewiring"),
    ),
    "thing": Vocab(
        ("report", "parcel", "refund", "key", "invoice", "laptop", "ticket", "contract"),
        ("price list", "sofa", "passport", "deposit"),
    ),
    "place": Vocab(("kitchen", "car park", "meeting room", "hallway", "laundry room"),
        ("garden", "lobby", "bike shed")),
}  # fmt: skip

FORMAL: tuple[Pair, ...] = (
    ("In the event that the {paper} is not received prior to {day}, your claim shall be deemed withdrawn.",
     "If we do not get the {paper} before {day}, we will treat your claim as withdrawn."),
    ("You are hereby requested to furnish the {paper} to the {office} within {days} days.",
     "Please send the {paper} to the {office} within {days} days."),
    ("Failure to remit the sum of {amount} by {day} shall result in the imposition of a surcharge.",
     "If you do not pay {amount} by {day}, we will have to add a fee."),
    ("Pursuant to our regulations, the {object} must be surrendered to the {office} upon termination of the agreement.",
     "Under our rules, please return the {object} to the {office} when the agreement ends."),
    ("The undersigned wishes to ascertain whether the {paper} has been processed.",
     "I would like to know whether the {paper} has been processed."),
    ("We regret to inform you that your request for a {object} cannot be acceded to at the present time.",
     "We are sorry, but we cannot give you a {object} right now."),
    ("Kindly be advised that {work} shall commence on {day} at {time}.",
     "Please note that {work} will start on {day} at {time}."),
    ("Notwithstanding the aforementioned, the tenant remains liable for the amount of {amount}.",
     "Even so, the tenant still has to pay {amount}."),
    ("Enclosed herewith please find the {paper}, which is to be returned forthwith.",
     "Here is the {paper}. Please return it soon."),
    ("Applicants are required to be in possession of a valid {object} at the time of submission.",
     "You need a valid {object} when you apply."),
    ("It is incumbent upon all residents to refrain from utilising the {place} subsequent to {time}.",
     "Please do not use the {place} after {time}."),
    ("Due to the fact that {work} has not been completed, access to the {place} is prohibited until {day}.",
     "Because {work} is not finished, please stay out of the {place} until {day}."),
    ("Payment in the amount of {amount} shall be effected no later than {days} days subsequent to receipt of the bill.",
     "Please pay {amount} within {days} days after you get the bill."),
    ("An appointment has been scheduled for you at the {office} on {day} at {time}; attendance is mandatory.",
     "You have an appointment at the {office} on {day} at {time}. You need to come."),
    ("We shall endeavour to expedite the processing of your {paper}.",
     "We will try to deal with your {paper} quickly."),
    ("Any objection to this decision must be lodged in writing with the {office} within {days} days of notification.",
     "If you disagree with this decision, please write to the {office} within {days} days."),
    ("The {office} shall not accept the {paper} by electronic means.",
     "The {office} cannot accept the {paper} by e-mail."),
    ("Prior to commencement of {work}, all personal effects must be removed from the {place}.",
     "Before {work} starts, please take your things out of the {place}."),
    ("The right to utilise the {object} is not transferable to third parties.",
     "Only you may use the {object}."),
    ("With reference to your letter of {day}, we hereby acknowledge receipt of the {paper}.",
     "Thank you for your letter of {day}. We have received the {paper}."),
    ("Should you be unable to attend on {day}, you are obliged to notify the {office} without delay.",
     "If you cannot come on {day}, please tell the {office} right away."),
    ("A reimbursement of {amount} will be effected upon verification of the {paper}.",
     "We will pay back {amount} once we have checked the {paper}."),
)  # fmt: skip

HELDOUT_FORMAL: tuple[Pair, ...] = (
    ("You are hereby notified that {work} will be terminated on {day}.",
     "Please note that {work} will end on {day}."),
    ("The {paper} must be submitted to the {office} prior to {day} in order for your application to be considered.",
     "Please send the {paper} to the {office} before {day} so that we can consider your application."),
    ("In the event of loss of the {object}, the holder shall be charged a replacement fee of {amount}.",
     "If you lose the {object}, you will have to pay {amount} for a new one."),
    ("It has come to our attention that the sum of {amount} remains outstanding; kindly remit payment by {day}.",
     "You still owe {amount}. Please pay by {day}."),
    ("Utilisation of the {place} is prohibited prior to {time}.",
     "Please do not use the {place} before {time}."),
    ("The {office} shall inform you of its decision within {days} days subsequent to receipt of the {paper}.",
     "The {office} will tell you its decision within {days} days after it gets the {paper}."),
    ("The undersigned hereby requests an extension of {days} days for the submission of the {paper}.",
     "I would like to ask for {days} more days to send the {paper}."),
    ("Residents are obliged to ensure that the {place} is vacated by {time} on {day}.",
     "Please leave the {place} by {time} on {day}."),
)  # fmt: skip

FORMAL_TAILS: tuple[Pair, ...] = (
    ("Should you require further assistance, do not hesitate to contact the undersigned.",
     "If you need more help, please contact me."),
    ("We thank you in advance for your cooperation in this matter.", "Thank you for your help."),
    ("Your prompt attention to the aforementioned matter would be appreciated.", "Please do this soon."),
    ("This communication was generated by automated means and is valid without signature.",
     "This letter was made by a computer and needs no signature."),
    ("Any inconvenience occasioned thereby is regretted.", "We are sorry for the trouble."),
    ("Further particulars may be obtained from the {office}.", "You can ask the {office} for more details."),
)  # fmt: skip

RUDE: tuple[Pair, ...] = (
    ("Where the hell is my {thing}? I've been waiting since {day}!",
     "Could you please tell me where my {thing} is? I have been waiting since {day}."),
    ("Send me the damn {thing} by {day} or you'll be sorry.", "Could you please send me the {thing} by {day}?"),
    ("Are you too stupid to read? I said {time}, not later.",
     "I think there was a misunderstanding: I had said {time}."),
    ("Clean up your mess in the {place}, you slobs.", "Could you please tidy up the {place}?"),
    ("Your {thing} is complete rubbish. Do it again.",
     "I am not happy with the {thing} yet. Could you please redo it?"),
    ("Stop wasting my time with this nonsense and finish the {thing} already.",
     "Could you please finish the {thing} soon?"),
    ("Nobody asked for your stupid opinion about the {thing}.",
     "Thank you, but I would rather decide about the {thing} myself."),
    ("You idiots charged me {amount} too much! I want my money back now.",
     "You charged me {amount} too much. Could you please refund it?"),
    ("Don't you dare come late again. Be here at {time}.", "Please be on time and come at {time}."),
    ("I couldn't care less about your pathetic excuses. The {thing} was due on {day}.",
     "I understand your reasons, but the {thing} was due on {day}."),
    ("Get your junk out of the {place} by {day}, or it goes in the bin.",
     "Please take your things out of the {place} by {day}. Otherwise we will have to remove them."),
    ("What moron put {amount} on this {thing}?", "Could you please tell me why the {thing} says {amount}?"),
    ("Turn that awful music down, it's past {time}!", "Could you please turn the music down? It is past {time}."),
    ("Hurry up with {work}, you lazy lot. It was supposed to be done by {day}.",
     "Could you please speed up {work}? It was planned to be done by {day}."),
    ("I've told you a hundred damn times to lock the {place}!", "Please remember to lock the {place}."),
    ("This {thing} is wrong, as usual. Can't you clueless people do anything right?",
     "There is a mistake in this {thing}. Could you please correct it?"),
)  # fmt: skip

HELDOUT_RUDE: tuple[Pair, ...] = (
    ("When will you idiots finally send the {thing}? You promised it for {day}!",
     "Could you please tell me when you will send the {thing}? You had promised it for {day}."),
    ("Keep your filthy shoes out of the {place}!", "Please do not wear dirty shoes in the {place}."),
    ("I'm sick of asking. Give me back my {thing} by {day}.", "Could you please give me back my {thing} by {day}?"),
    ("{amount} for this useless {thing}? You must be joking.",
     "I think {amount} is too much for this {thing}."),
    ("Show up at {time} for once, you lazy lot.", "Could you please come at {time}?"),
    ("Who was dumb enough to leave the {place} open all night?",
     "Could you please tell me who left the {place} open all night?"),
)  # fmt: skip

RUDE_TAILS: tuple[Pair, ...] = (
    ("And don't give me that nonsense about being busy.", "I know that you are busy."),
    ("Is that so hard to understand?", "Thank you for understanding."),
    ("I won't say it again.", "Thank you."),
    ("Answer me, for once!", "I look forward to your answer."),
    ("What a pathetic way to run a business.", "I hope you can improve this."),
    ("And be quick about it.", "I would be grateful for a quick reply."),
)  # fmt: skip
